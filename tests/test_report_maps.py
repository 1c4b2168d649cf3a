"""Attention, regions and parts as the report draws them."""

import base64
import io
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from configs import hacnn, pcb_rpp
from mros_jax.report import write_report
from mros_jax.report.maps import color_heat, draw_maps, explain, is_drawn
from mros_jax.runs.run import Run
from tests.runs import make_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


def read_alpha(uri):
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(PIL.Image.open(io.BytesIO(data)))[..., 3]


def test_heat_goes_from_nothing_to_what_covers():
    colors = color_heat(np.array([[0.0, 0.5, 1.0]]))
    assert colors.shape == (1, 3, 4)
    assert colors[0, :, 3].tolist() == [0, 100, 200]
    assert np.all(np.diff(colors[0, :, 1].astype(int)) > 0)


def test_regions_are_rectangles_within_the_image():
    boxes = np.array([[[-0.1, 0.0, 0.15, 1.0], [0.5, 0.25, 0.75, 1.25]]])
    ((drawing,),) = draw_maps({"regions_x2": boxes, "x2": np.zeros((1, 4, 2, 3))})
    assert drawing.label == "regions, x2"
    assert drawing.overlay is None
    assert drawing.boxes == ((0, 0, 15, 100), (50, 25, 25, 75))


def test_attention_is_a_mean_from_least_to_most():
    attention = np.full((2, 4, 2, 3), 0.5)
    attention[0, 3, 1] = [0.6, 0.7, 0.8]
    first, second = draw_maps({"attention_x1": attention})
    assert first[0].label == "attention, x1: 0.500 to 0.700"
    alpha = read_alpha(first[0].overlay)
    assert alpha.shape == (128, 64)
    assert np.all(alpha[96:, 32:] == 200)
    assert alpha.sum() == 200 * 32 * 32
    assert not read_alpha(second[0].overlay).any()  # the same everywhere


def test_parts_are_a_picture_each():
    shares = np.zeros((1, 4, 2, 2))
    shares[:, :1, :, 0] = 1
    shares[:, 1:, :, 1] = 1
    ((top, rest),) = draw_maps({"parts": shares})
    assert top.label == "part 1: 25 % of the image"
    assert rest.label == "part 2: 75 % of the image"
    np.testing.assert_array_equal(read_alpha(top.overlay)[:, 0], np.repeat([200, 0], [32, 96]))
    assert np.all(read_alpha(top.overlay) + read_alpha(rest.overlay) == 200)


def test_what_is_drawn_goes_by_name():
    assert [n for n in ("x1", "parts", "t4", "attention_x1", "regions_x3") if is_drawn(n)] == [
        "parts",
        "attention_x1",
        "regions_x3",
    ]
    assert draw_maps({"t4": np.zeros((2, 3, 3, 8))}) == []
    assert len(explain(["attention_x1", "attention_x2", "regions_x1"])) == 2


def make_run_of(system, tmp_path_factory, cache_dir, **fields):
    config = system.get_config()
    return make_run(
        tmp_path_factory.mktemp("runs") / config.name,
        cache_dir,
        network=ConfigDict({**config.network, **fields}),
        objective=config.objective,
    )


@pytest.fixture(scope="module")
def run_with_parts(tmp_path_factory, cache_dir):
    return make_run_of(pcb_rpp, tmp_path_factory, cache_dir, trunk="tiny")


@pytest.fixture(scope="module")
def run_with_regions(tmp_path_factory, cache_dir):
    return make_run_of(hacnn, tmp_path_factory, cache_dir, stem=4, widths=(16, 16, 16), embedded=8)


def read_views(run, page):
    """The section of three queries: a best, a worst and a random one."""
    text = write_report(run, page, queries=1, top=2).read_text()
    assert 'href="#views"' in text
    [section] = re.findall(r'<section id="views">.*?</section>', text, re.DOTALL)
    assert section.count("<article") == 3
    return section


@pytest.mark.slow
def test_report_shows_each_part(run_with_parts, tmp_path):
    section = read_views(run_with_parts, tmp_path / "page.html")
    assert section.count('class="over"') == 3 * 6
    shares = [int(x) for x in re.findall(r"part \d: (\d+) % of the image", section)]
    assert len(shares) == 2 * 3 * 6  # once as text, once as a label
    for of_an_image in np.reshape(shares, (-1, 6)):
        assert sum(of_an_image) == pytest.approx(100, abs=3)  # whole numbers


@pytest.mark.slow
def test_report_shows_each_region_and_attention(run_with_regions, tmp_path):
    section = read_views(run_with_regions, tmp_path / "page.html")
    assert section.count('class="region"') == 3 * 3 * 4
    assert section.count('class="over"') == 3 * 3
    assert len(set(re.findall(r'aria-label="(.*?)"', section))) == 3 * 3 * 4
    assert len(set(re.findall(r'class="over" src=".*?" alt="(.*?)"', section))) == 3 * 3
    # The third region of a level of a new network begins at (tanh(0.25) + 1) / 2 - 1 / 8.
    top = 100 * ((np.tanh(0.25) + 1) / 2 - 1 / 8)
    tops = [float(x) for x in re.findall(r'style="top: ([\d.]+)%', section)]
    assert tops[2::4] == pytest.approx([top] * 9, abs=0.01)


def test_says_why_there_are_no_views(run_with_parts, tmp_path):
    copy = shutil.copytree(run_with_parts, tmp_path / "copy")
    shutil.rmtree(Run.open(copy).checkpoints)
    text = write_report(copy, queries=1, top=2).read_text()
    assert "What the network looks at cannot be shown" in text
    assert 'class="over"' not in text

"""The embedded data set: what is drawn, how it is rendered, and what is written to disk."""

import dataclasses
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mros_jax.data.datasets.layouts import read_market1501
from mros_jax.data.synthetic import dataset as synthetic
from mros_jax.data.synthetic import imaging, pedestrians, rendering
from mros_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = synthetic.CHUNK  # every test draws and renders a whole chunk: one compilation for all


def small(**overrides):
    return synthetic.make_dataset(**{**synthetic.PRESETS["small"], **overrides})


@pytest.fixture(scope="module")
def dataset():
    return small()


@pytest.fixture(scope="module")
def query_pixels(dataset):
    return dataset.query.images.render()


def matches_elsewhere(dataset):
    """(Q,) gallery images of the query's identity taken by another camera."""
    query, gallery = dataset.query, dataset.gallery
    same = query.pids[:, None] == gallery.pids[None]
    return (same & (query.camids[:, None] != gallery.camids[None])).sum(1)


# ---------------------------------------------------------------- what there is


def test_market_preset_has_the_numbers_of_market1501():
    data = synthetic.make_dataset(**synthetic.PRESETS["market"])
    assert [len(split) for split in data.splits] == [12_936, 3_368, 19_732]
    assert data.num_classes == 751
    assert len(np.unique(data.query.pids)) == 750
    assert (data.gallery.junk.sum(), data.gallery.distractors.sum()) == (3_819, 2_793)
    assert set(data.train.camids) == set(data.query.camids) == {1, 2, 3, 4, 5, 6}
    assert matches_elsewhere(data).min() >= 1
    for pid in data.pid_of_label:
        assert len(np.unique(data.train.camids[data.train.pids == pid])) >= 2


@pytest.mark.parametrize("preset", ["small", "demo"])
def test_splits_fit_together(preset):
    data = synthetic.make_dataset(**synthetic.PRESETS[preset])
    sizes = synthetic.PRESETS[preset]
    cells = sizes["num_test_pids"] * sizes.get("num_cameras", 6)
    each = sizes["images_per_pid_and_camera"]
    assert len(data.train) == sizes["num_train_pids"] * sizes.get("num_cameras", 6) * each
    assert len(data.query) == cells
    assert len(data.gallery) == cells * each + sizes["num_distractors"] + sizes["num_junk"]
    assert not set(data.train.pids) & set(data.gallery.pids)
    assert set(data.query.pids) == set(data.gallery.pids) - {-1, 0}
    assert matches_elsewhere(data).min() >= 1
    names = np.concatenate([split.names for split in data.splits])
    assert len(np.unique(names)) == len(names)
    for split in data.splits:
        assert list(split.names) == sorted(split.names)
    np.testing.assert_array_equal(data.pid_of_label[data.train.labels], data.train.pids)


def test_queries_without_a_match_are_made_when_asked_for():
    data = small(num_single_camera_pids=3)
    hopeless = matches_elsewhere(data) == 0
    assert len(np.unique(data.query.pids[hopeless])) == hopeless.sum() == 3
    alone = small(num_cameras=1, num_single_camera_pids=8)
    assert matches_elsewhere(alone).max() == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_train_pids": 0}, "num_train_pids is 0; expected at least 1"),
        ({"num_junk": -1}, "num_junk is -1; expected 0 or more"),
        ({"height": 120}, "height x width is 120 x 64; both are to be multiples of 16"),
        ({"lookalikes": 9}, "lookalikes is 9; at most 8"),
        ({"num_cameras": 1}, "no query has a true match"),
        ({"num_single_camera_pids": 9}, "more than num_test_pids 8"),
        ({"num_query_images": 15}, "expected 16 to 24"),
        ({"num_query_images": 25}, "expected 16 to 24"),
        ({"num_gallery_images": 23}, "expected at least 24"),
        ({"num_query_images": 16, "num_gallery_images": 15}, "expected at least 16"),
        ({"num_train_images": 23}, "expected at least 24"),
        ({"seed": 2**31}, "expected less than 2\\*\\*31"),
    ],
)
def test_numbers_that_cannot_be_met(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


@settings(max_examples=25, deadline=None)
@given(
    train=st.integers(1, 9),
    test=st.integers(1, 9),
    cameras=st.integers(2, 7),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**31 - 1),
)
def test_given_totals_are_met_exactly(train, test, cameras, more, seed):
    queries = min(2 * test + more, test * cameras)
    data = synthetic.make_dataset(
        num_train_pids=train,
        num_test_pids=test,
        num_cameras=cameras,
        num_train_images=2 * train + more,
        num_query_images=queries,
        num_gallery_images=queries + more,
        num_distractors=0,
        num_junk=0,
        seed=seed,
    )
    assert [len(s) for s in data.splits] == [2 * train + more, queries, queries + more]
    assert data.num_classes == train
    assert matches_elsewhere(data).min() >= 1
    assert len(np.unique(np.stack([data.query.pids, data.query.camids]), axis=1).T) == queries


# ---------------------------------------------------------------- who is drawn


def test_a_person_depends_on_the_seed_and_the_number_alone(dataset):
    lookalikes = dataset.query.images.lookalikes
    numbers = np.arange(1, 1 + ROWS, dtype=np.int32)
    first, later, other = (
        pedestrians.draw_people(seed, numbers + start, lookalikes=lookalikes)
        for seed, start in ((7, 0), (7, 4), (8, 4))
    )
    for name, value in vars(later).items():
        np.testing.assert_array_equal(value[:-4], getattr(first, name)[4:])
    assert not np.array_equal(later.top[0], other.top[0])


@pytest.mark.parametrize("seed", range(5))
def test_lookalikes_share_everything_but_their_details_and_no_two_are_equal(seed):
    people = pedestrians.draw_people(seed, jnp.arange(1, 25), lookalikes=8)
    colours = jnp.where(people.detail_on[..., None] > 0, people.detail_colour, -1.0)
    shown = np.asarray(colours).reshape(3, 8, 8, 3)  # group, member, detail, colour
    for name, value in vars(people).items():
        if not name.startswith("detail"):
            groups = np.asarray(value).reshape(3, 8, -1)
            np.testing.assert_array_equal(groups, np.repeat(groups[:, :1], 8, 1))
    differs = (shown[:, :, None] != shown[:, None]).any(-1).sum(-1)  # (3, 8, 8) details apart
    others = ~np.eye(8, dtype=bool)
    assert differs[:, others].min() >= 1
    assert differs.max() <= 4


# ---------------------------------------------------------------- how it is rendered


PINK = (0.9, 0.1, 0.8)


def clean_view():
    """Rows of the same plain person seen from in front, to be edited row by row, in dicts."""
    ones = np.ones(ROWS, np.int32)
    people = as_rows(pedestrians.draw_people(0, ones, lookalikes=1))
    for kind in ("hat_kind", "bag_kind", "bottom_kind"):
        people[kind][:] = 0
    people["hair_kind"][:] = 1
    people["height"][:] = 0.97
    people["detail_on"][:] = 0
    people["detail_colour"][:] = PINK
    pictures = as_rows(pedestrians.draw_pictures(0, 0, ones, ones, ones, ones * 0))
    for name in ("yaw", "lean", "shift", "occluder_kind"):
        pictures[name][:] = 0
    pictures["stride"][:] = 0.1
    pictures["scale"][:] = pictures["exposure"][:] = 1
    return people, pictures


def as_rows(drawn):
    return {name: v if name == "noise_key" else np.array(v) for name, v in vars(drawn).items()}


def render_rows(people, pictures, count):
    """The first `count` rows, by a camera without blur, noise, tint or JPEG."""
    cameras = as_rows(pedestrians.draw_cameras(0, np.arange(1, 4, dtype=np.int32)))
    for name, value in {"blur": 0.05, "noise": 0, "light": 0, "pitch": 0.1, "jpeg": 100}.items():
        cameras[name][:] = value
    for name in ("resolution", "cast", "gamma", "contrast"):
        cameras[name][:] = 1
    rows = (
        kind(**{name: jnp.asarray(value) for name, value in drawn.items()})
        for kind, drawn in (
            (pedestrians.Person, people),
            (pedestrians.Picture, pictures),
            (pedestrians.Camera, cameras),
        )
    )
    images = rendering.render(*rows, np.zeros(ROWS, np.int32), height=128, width=64)
    return np.asarray(images)[:count].astype(int)


def count_changed(first, second):
    return int((np.abs(first - second).max(-1) > 24).sum())


DETAIL_ROWS = {
    "hat": (6, 22),
    "collar": (21, 35),
    "logo": (30, 50),
    "sleeve": (30, 54),
    "hem": (58, 78),
    "knee": (76, 100),
    "socks": (102, 122),
    "shoes": (112, 126),
}


@pytest.mark.slow
def test_a_detail_changes_the_pixels_of_its_stripe_and_no_others():
    assert tuple(DETAIL_ROWS) == pedestrians.DETAILS
    people, pictures = clean_view()
    for slot in range(8):
        people["detail_on"][1 + slot, slot] = 1
    plain, *others = render_rows(people, pictures, 9)
    for (detail, (top, bottom)), image in zip(DETAIL_ROWS.items(), others, strict=True):
        assert count_changed(image, plain) >= 25, detail
        rows = np.flatnonzero((np.abs(image - plain).max(-1) > 24).any(1))
        assert top <= rows.min() <= rows.max() <= bottom, (detail, rows.min(), rows.max())


@pytest.mark.slow
def test_every_attribute_shows():
    pairs = (
        ("hair_kind", 0, 3), ("top_kind", 0, 1), ("top_kind", 0, 2), ("bottom_kind", 0, 1),
        ("bottom_kind", 1, 2), ("bag_kind", 0, 1), ("bag_kind", 0, 2), ("long_sleeves", 0, 1),
        ("girth", 0.9, 1.2), ("height", 0.9, 1.0), ("shoulders", 0.92, 1.1), ("skin", 0.3, 0.8),
        ("hair", 0.1, 0.7), ("top", 0.1, 0.8), ("bottom", 0.1, 0.8),
    )  # fmt: skip
    people, pictures = clean_view()
    for i, (field, *values) in enumerate(pairs):
        people[field][2 * i], people[field][2 * i + 1] = values
    images = render_rows(people, pictures, 2 * len(pairs))
    for (field, *_), first, second in zip(pairs, images[::2], images[1::2], strict=True):
        assert count_changed(first, second) >= 25, field


def test_the_view_decides_what_shows():
    people, pictures = clean_view()
    pictures["yaw"][3:] = np.pi
    people["detail_on"][[1, 4], pedestrians.DETAILS.index("logo")] = 1
    people["bag"][:] = PINK
    people["bag_kind"][[2, 5]] = 1  # a backpack
    images = render_rows(people, pictures, 6)
    logo_front, backpack_front = (count_changed(images[0], image) for image in images[1:3])
    logo_back, backpack_back = (count_changed(images[3], image) for image in images[4:6])
    assert logo_front >= 25
    assert logo_back == 0
    assert backpack_back > 2 * backpack_front > 0


def test_junk_boxes_and_empty_boxes_differ_from_good_ones():
    row = np.full(ROWS, 3, np.int32)
    good, junk, nobody = (
        as_rows(pedestrians.draw_pictures(0, 2, row, row, row, row * 0 + flaw)) for flaw in range(3)
    )
    assert np.abs(junk["shift"]).max() > 3 * np.abs(good["shift"]).max()
    assert abs(junk["scale"][0] - 1) > 0.15
    assert (good["present"][0], nobody["present"][0]) == (1.0, 0.0)


def test_same_seed_same_bytes_whatever_the_chunk(dataset, query_pixels):
    renderer = dataset.query.images
    assert query_pixels.shape == (24, 128, 64, 3)
    assert query_pixels.dtype == np.uint8
    np.testing.assert_array_equal(small().query.images.render(), query_pixels)
    pieces = list(dataclasses.replace(renderer, chunk=5).chunks())
    assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 4]
    np.testing.assert_array_equal(np.concatenate(pieces), query_pixels)


def test_another_seed_or_split_gives_other_pictures(dataset, query_pixels):
    other = small(seed=1).query.images.render()
    assert (np.abs(other.astype(int) - query_pixels).mean((1, 2, 3)) > 5).all()
    keys = {split.images.digest() for split in (*dataset.splits, *small(seed=1).splits)}
    assert len(keys) == 6
    train = dataclasses.replace(dataset.query.images, stream=0)
    assert (train.render() != query_pixels).any((1, 2, 3)).all()


def test_a_selection_shows_the_same_pictures(dataset, query_pixels):
    chosen = dataset.query.select(np.array([7, 2])).images
    np.testing.assert_array_equal(chosen.render(), query_pixels[[7, 2]])
    with Image.open(io.BytesIO(chosen.encoded(1))) as image:
        np.testing.assert_array_equal(np.asarray(image), query_pixels[2])
    digests = {images.digest() for images in (chosen, dataset.query.images)}
    assert len(digests | {dataset.query.select(np.array([2, 7])).images.digest()}) == 3


def test_products_are_float32_on_accelerators_too(dataset, unchecked):
    """By default a GPU takes 11 bits of each number, and a TPU 8: other pictures."""
    rows = np.zeros(ROWS, np.int32)
    people = pedestrians.draw_people(0, rows, lookalikes=dataset.query.images.lookalikes)
    pictures = pedestrians.draw_pictures(0, 0, rows, rows, rows + 1, rows)
    cameras = pedestrians.draw_cameras(0, np.arange(1, 4, dtype=np.int32))
    text = rendering.render.lower(people, pictures, cameras, rows).as_text().splitlines()
    products = [line for line in text if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
def test_other_sizes():
    assert small(height=64, width=32, num_test_pids=2).query.images.render().shape == (6, 64, 32, 3)


def test_pictures_of_an_identity_are_alike():
    """Colour means of six stripes find the identity in another camera better than chance."""
    data = synthetic.make_dataset(
        num_train_pids=1, num_test_pids=40, num_cameras=3, images_per_pid_and_camera=1,
        num_distractors=0, num_junk=0, lookalikes=1,
    )  # fmt: skip
    query, gallery = data.query, data.gallery

    def describe(split):
        assert isinstance(split.images, synthetic.Renderer)
        images, camids = split.images.render(), split.camids
        crop = images[:, :126, 20:44].reshape(len(images), 6, 21, 24, 3)  # six stripes
        values = crop.mean((2, 3)).reshape(len(images), -1)
        for camid in np.unique(camids):  # a camera's tint is common to all of its pictures
            values[camids == camid] -= values[camids == camid].mean(0)
        return values

    q, g = (describe(split) for split in (query, gallery))
    distance = np.linalg.norm(q[:, None] - g[None], axis=-1)
    distance[query.camids[:, None] == gallery.camids[None]] = np.inf
    hits = gallery.pids[distance.argmin(1)] == query.pids
    assert hits.mean() > 0.5, hits.mean()  # chance is 1 / 40


# ---------------------------------------------------------------- what the camera does


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_jpeg_is_what_libjpeg_makes(quality):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 4, 3)).repeat(16, 0).repeat(16, 1).astype(float)
    picture = np.clip(picture + rng.normal(0, 12, (128, 64, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(file)).astype(float)
    simulate = jax.jit(imaging.jpeg)
    got = simulate(jnp.float32(picture).transpose(2, 0, 1), jnp.float32(quality))
    got = np.clip(np.asarray(got).transpose(1, 2, 0), 0, 255)
    # libjpeg interpolates colour between its samples, we repeat it: that differs at edges.
    inside = (slice(None), slice(4, 12), slice(None), slice(4, 12))
    error, loss = (
        np.abs(other - expected).reshape(8, 16, 4, 16, 3)[inside].mean() for other in (got, picture)
    )
    assert error < 1.25
    assert error < 0.3 * loss


@pytest.mark.slow
def test_a_perfect_sensor_changes_nothing_and_a_coarse_one_keeps_the_mean():
    cameras = dataclasses.replace(
        pedestrians.draw_cameras(0, jnp.array([1, 2])),
        blur=jnp.array([0.05, 0.8]),
        resolution=jnp.array([1.0, 0.5]),
    )
    vertical, horizontal = imaging.make_sensors(cameras, 128, 64)
    np.testing.assert_allclose(vertical[0], np.eye(128), atol=1e-6)
    np.testing.assert_allclose(horizontal[0], np.eye(64), atol=1e-6)
    np.testing.assert_allclose(vertical[1].sum(1), 1.0, atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(vertical[1]), tol=1e-4) <= 64


# ---------------------------------------------------------------- what is written


def test_written_files_read_back_as_the_same_data_set(tmp_path, dataset):
    out = tmp_path / "data"
    synthetic.main(["--out", str(out), "--preset", "small"])
    assert sorted(p.name for p in out.iterdir()) == sorted(synthetic.FOLDERS.values())
    read = read_market1501(out)
    for ours, theirs in zip(dataset.splits, read.splits, strict=True):
        for column in ("names", "pids", "camids", "sequences"):
            np.testing.assert_array_equal(getattr(theirs, column), getattr(ours, column))
        pixels = ours.images.render()
        for i in (0, len(ours) - 1):
            picture = np.asarray(Image.open(io.BytesIO(theirs.images.encoded(i))))
            assert np.abs(picture.astype(int) - pixels[i]).mean() < 4
    np.testing.assert_array_equal(read.train.labels, dataset.train.labels)
    np.testing.assert_array_equal(read.pid_of_label, dataset.pid_of_label)


def test_nothing_is_written_over_other_files(tmp_path, dataset):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty; nothing was written"):
        synthetic.write_dataset(dataset, tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is a file"):
        synthetic.write_dataset(dataset, tmp_path / "mine.txt", progress=False)


def test_a_broken_write_leaves_no_half_folder(tmp_path, dataset, monkeypatch):
    saved = []

    def fail_later(self, path, **options):
        saved.append(path)
        if len(saved) == 80:  # in the second folder
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail_later)
    with pytest.raises(OSError, match="No space left"):
        synthetic.write_dataset(dataset, tmp_path / "out", progress=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["bounding_box_train"]


def test_command_line_errors(tmp_path, capsys):
    with pytest.raises(UserError, match="lookalikes is 9; at most 8"):
        synthetic.main(["--out", str(tmp_path), "--lookalikes", "9"])
    with pytest.raises(SystemExit):
        synthetic.main(["--preset", "small"])
    assert "--out" in capsys.readouterr().err
    help_text = subprocess.run(
        [sys.executable, "-m", "mros_jax.data.synthetic", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "--num_train_pids" in help_text

"""The explorer: what it lists and counts is the protocol's; its page shows that, to us alone."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from mros_jax import config as configs
from mros_jax import extras
from mros_jax.errors import NotFoundError, UserError
from mros_jax.explorer.exploration import KINDS, Exploration
from mros_jax.explorer.projection import project
from mros_jax.inspection.ranking import SHORTLIST
from mros_jax.retrieval import ECN, compute_distances
from scripts import chromium
from scripts.bench_explorer import write_run
from tests import devtools
from tests.runs import copy_run
from tests.training import ROOT, make_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

JUNK = 3


def make_data(config, seed=0):
    """Twelve queries of four people in three cameras; the gallery has distractors and junk."""
    rng = np.random.default_rng(seed)
    network = configs.make_network(config, 2)
    size = sum(part.size for part in network.parts(*configs.find_size(config, config.eval)))
    pids = np.repeat(np.arange(1, 5), 3)
    camids = np.tile(np.arange(1, 4), 4)
    others = np.array([0] * 5 + [-1] * JUNK)
    gallery_pids = np.concatenate([np.repeat(pids, 2), others])
    gallery_camids = np.concatenate([np.repeat(camids, 2), np.arange(len(others)) % 3 + 1])
    centers = rng.standard_normal((6, size))
    return {
        f"{split}_{name}": value
        for split, pid, camid in (
            ("query", pids, camids),
            ("gallery", gallery_pids, gallery_camids),
        )
        for name, value in (
            ("features", (centers[pid] + 1.5 * rng.standard_normal((len(pid), size))).astype("f4")),
            ("pids", pid),
            ("camids", camid),
        )
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory, cache_dir):
    config = make_config(cache_dir)
    base = tmp_path_factory.mktemp("explored")
    return write_run(base / "run", base / "images", make_data(config), config)


@pytest.fixture(scope="module")
def run(path):
    return Exploration(path)


def test_queries_are_found_by_identity_camera_and_ap(run):
    aps = run.run.rankings[0]["ap"]  # every query has a match
    assert run.find_queries().tolist() == np.argsort(aps, kind="stable").tolist()
    best = run.find_queries(order="best first")
    assert np.all(np.diff(np.array(aps)[best]) <= 0)
    assert run.find_queries(pid=2, order="as in the data set").tolist() == [3, 4, 5]
    assert run.find_queries(pid=2, camid=3).tolist() == [5]
    assert len(run.find_queries(pid=77)) == 0
    line = run.describe_query(5)
    assert "0002_c3s1_000005_00.jpg · pid 2 · c3 · AP " in line
    assert f"{100 * aps[5]:.1f}" in line


def test_lists_are_marked_as_the_protocol_counts(run):
    features = run.features
    shown = run.list_query(4, top=1000)
    assert (shown["pid"], shown["camera"]) == (2, 2)
    assert [own["name"] for own in shown["lists"]] == ["Plain", "ECN"]
    row = compute_distances(features["query_features"][4:5], features["gallery_features"])[0]
    plain, ecn = (own["entries"] for own in shown["lists"])
    names = features["gallery_names"].tolist()
    order = [names.index(entry["name"]) for entry in plain]
    np.testing.assert_allclose([e["distance"] for e in plain], row[order], atol=1e-6)
    assert row[order].tolist() == sorted(row[order])
    for entry, index in zip(plain, order, strict=True):
        pid, camid = features["gallery_pids"][index], features["gallery_camids"][index]
        if pid == -1:
            expected = "junk", "junk"
        elif pid == 2:
            expected = ("junk", "own camera") if camid == 2 else ("match", "")
        else:
            expected = ("distractor" if pid == 0 else "wrong"), ""
        assert (entry["status"], entry["reason"]) == expected
        total = sum(sum(values) for values in entry["parts"].values())
        assert total == pytest.approx(entry["distance"], abs=1e-4)
    assert not any(entry["reason"] == "junk" for entry in ecn)  # junk was left out there
    assert shown["lists"][0]["ap"] == run.run.rankings[0]["ap"][4]
    assert shown["picture"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("query", [-1, 12])
def test_other_queries_are_refused(run, query):
    with pytest.raises(UserError, match=rf"query is {query}; the run has 0\.\.11"):
        run.list_query(query, 5)


class Camera:
    """In place of a trained network: it always sees the same."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def embed(self, images, *, flip_test, crops):
        (image,) = images
        assert image.dtype == np.uint8
        assert (flip_test, crops) == (False, "none")
        return self.descriptor[None]


def encode(size=(40, 80)):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(out, "PNG")
    return out.getvalue()


def test_uploads_are_ranked_and_nothing_is_right_or_wrong(run, monkeypatch):
    gallery = run.features["gallery_features"]
    monkeypatch.setitem(run.__dict__, "_model", Camera(gallery[7]))
    shown = run.list_upload(encode(), "somebody.png", 1000)
    assert (shown["name"], shown["pid"], shown["camera"]) == ("somebody.png", None, None)
    plain, ecn = (own["entries"] for own in shown["lists"])
    assert plain[0]["name"] == run.features["gallery_names"][7]
    assert plain[0]["distance"] == pytest.approx(0, abs=1e-6)
    assert len(plain) == len(gallery)
    statuses = [entry["status"] for entry in plain]
    assert statuses.count("junk") == JUNK
    assert statuses.count("unknown") == len(gallery) - JUNK
    kept = np.flatnonzero(run.features["gallery_pids"] != -1)
    expected = ECN(k=5).distances(gallery[7:8], gallery[kept])[0]
    assert [e["distance"] for e in ecn] == pytest.approx(np.sort(expected).tolist(), rel=1e-6)
    assert shown["lists"][1]["note"] == f"of the {SHORTLIST:,} nearest"


@pytest.mark.parametrize("data", [b"", b"GIF89a but not really", b"plain text", encode()[:-40]])
def test_uploads_that_are_no_image_are_refused(run, data):
    with pytest.raises(UserError, match=r"image note\.txt cannot be read"):
        run.list_upload(data, "note.txt", 5)


def test_errors_at_a_threshold(run):
    features = run.features
    distance = compute_distances(features["query_features"], features["gallery_features"])
    same = features["query_pids"][:, None] == features["gallery_pids"]
    own = features["query_camids"][:, None] == features["gallery_camids"]
    genuine = distance[same & ~own]
    impostors = distance[~same & (features["gallery_pids"] != -1)]
    assert len(impostors) == run.verification.num_impostor
    for asked in (genuine.min(), np.median(genuine), genuine.max() + 1):
        errors = run.count_errors(float(asked))
        assert errors.threshold <= asked
        assert errors.misses == np.sum(genuine > asked)
        assert errors.false_accepts == np.sum(impostors <= np.float32(errors.threshold))
    least = run.count_errors(-5.0)
    assert least.threshold == pytest.approx(genuine.min())


def test_hard_pairs_are_the_nearest_impostors_and_farthest_mates(run):
    features = run.features
    distance = compute_distances(features["query_features"], features["gallery_features"])
    same = features["query_pids"][:, None] == features["gallery_pids"]
    own = features["query_camids"][:, None] == features["gallery_camids"]
    impostor = np.where(same | (features["gallery_pids"] == -1), np.inf, distance)
    mate = np.where(same & ~own, distance, -np.inf)
    impostors, mates = (run.hard_pairs[kind] for kind in KINDS)
    for pairs, table, best in ((impostors, impostor, np.argmin), (mates, mate, np.argmax)):
        assert sorted(pairs.queries) == list(range(12))
        assert pairs.gallery.tolist() == best(table, axis=1)[pairs.queries].tolist()
        np.testing.assert_allclose(pairs.distances, table[pairs.queries, pairs.gallery], atol=1e-6)
    assert np.all(np.diff(impostors.distances) >= 0)
    assert np.all(np.diff(mates.distances) <= 0)
    (first, second) = run.list_hard_pairs("farthest mates", 2)
    assert first["lists"][0]["entries"][0]["status"] == "match"
    assert first["lists"][0]["entries"][0]["pid"] == first["pid"]
    assert second["name"] == features["query_names"][mates.queries[1]]


def test_hard_pairs_as_a_table(run):
    rows = list(csv.DictReader(io.StringIO(run.write_hard_pairs())))
    assert [row["kind"] for row in rows] == ["nearest impostor"] * 12 + ["farthest mate"] * 12
    mates = run.hard_pairs["farthest mates"]
    row = rows[12]
    assert row["query_name"] == run.features["query_names"][mates.queries[0]]
    assert row["gallery_name"] == run.features["gallery_names"][mates.gallery[0]]
    assert row["query_pid"] == row["gallery_pid"]
    assert row["query_camid"] != row["gallery_camid"]
    assert float(row["distance"]) == pytest.approx(mates.distances[0], rel=1e-5)


def test_projection_is_the_principal_plane():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 8)) * np.array([5, 3, *np.linspace(1, 0.1, 6)])
    placed, shares = project(features, normalize=False)
    centered = features - features.mean(0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    np.testing.assert_allclose(np.abs(placed), np.abs(u[:, :2] * s[:2]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(shares, s[:2] ** 2 / (s**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(project(features[::-1], False)[0][::-1], placed, atol=1e-3)
    unit, _ = project(features)
    scaled, _ = project(features * rng.uniform(1, 9, (50, 1)))
    np.testing.assert_allclose(unit, scaled, atol=1e-4)
    with pytest.raises(UserError, match=r"\(2, 8\) make no map"):
        project(features[:2])


def test_map_leaves_out_junk_and_samples(run):
    whole = run.map_descriptors("identity")
    assert whole["total"] == len(whole["points"]) == 12 + 24 + 5
    assert {point["label"] for point in whole["points"]} == {0, 1, 2, 3, 4}
    assert {point["label"] for point in run.map_descriptors("camera")["points"]} == {1, 2, 3}
    for axis in "xy":
        places = [point[axis] for point in whole["points"]]
        assert (min(places), max(places)) == (0, 1)
    few = run.map_descriptors("camera", most=10)
    assert (len(few["points"]), few["total"]) == (10, 41)
    assert few == run.map_descriptors("camera", most=10)
    names = {split: set(run.features[f"{split}_names"]) for split in ("query", "gallery")}
    assert all(point["name"] in names[point["split"]] for point in whole["points"])


def test_runs_that_cannot_be_explored(path, run, tmp_path, cache_dir):
    with pytest.raises(NotFoundError, match="is not a run"):
        Exploration(tmp_path)
    config = make_config(cache_dir)
    other = write_run(tmp_path / "run", tmp_path / "images", make_data(config, 1), config)
    run.check_same_images(Exploration(other))
    run_with_others = Exploration(other)
    run_with_others.features["gallery_fingerprint"] = np.array("others")
    with pytest.raises(UserError, match="was tested on other gallery images than"):
        run.check_same_images(run_with_others)
    (tmp_path / "images" / "query" / str(run.features["query_names"][0])).unlink()
    with pytest.raises(UserError, match="tested on 1 images that are not in market1501 any more"):
        Exploration(other)
    (other / "features.npz").unlink()
    with pytest.raises(NotFoundError, match=r"holds no features\.npz.*mros_jax\.evaluate --run"):
        Exploration(other)


# The page, in a process of its own and a real browser.

_needs = extras.find_missing("explore", "the explorer")
if chromium.find_chromium() is None:
    _needs = "no chromium, chromium-browser or google-chrome on the PATH"
needs_page = pytest.mark.skipif(_needs is not None, reason=_needs or "")
_GRADIO_SAYS = "Method not implemented."  # a warning of its own, whenever a stream ends


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    return copy_run(tmp_path_factory.mktemp("runs") / "small", cache_dir)


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "mros_jax.explore", str(trained), "--against", str(trained)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line
            yield found.group()
            assert [path.name[:14] for path in temporary.iterdir()] == ["mros_explorer_"]
        finally:
            process.terminate()
    assert process.returncode == 0
    assert list(temporary.iterdir()) == []  # uploads are gone


def _open(tab, name):
    """Chooses a tab, from the menu of those that a narrow page has no room for if it is there."""
    tab.wait("document.querySelector('button[role=tab]')")
    find = "[...document.querySelectorAll('{}')].find((e) => e.innerText.trim() === {!r})".format
    button = find("button[role=tab]", name)
    if not tab.ask(f"!!({button})"):
        tab.press("document.querySelector('.overflow-menu > button')")
        button = find(".overflow-menu button", name)
    tab.press(button)


def _choose(tab, label, value):
    """Chooses a value in one of gradio's lists."""
    box = f"document.querySelector('input[aria-label={json.dumps(label)}]')"
    tab.press(box)
    option = (
        "[...document.querySelectorAll('[role=option]')]"
        f".find((e) => e.innerText.replace('✓', '').trim() === {value!r})"
    )
    tab.press(option)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
@pytest.mark.slow
@needs_page
def test_every_view_in_a_browser(address, trained, tmp_path, width, dark):
    with devtools.open_tab() as tab:
        tab.show(width=width, dark=dark)
        tab.send("Page.navigate", url=address)
        # Two runs beside each other, each with two rankings.
        tab.wait("document.querySelectorAll('#listed .run .ranking').length === 4")
        tab.press("document.querySelector('#listed .ranking button')")
        parts = tab.wait("document.querySelector('#pair-dialog[open]')?.innerText")
        assert "cosine distance" in parts
        assert "t4" in parts
        assert tab.ask("document.querySelectorAll('#pair-dialog .face u').length") > 1
        tab.press("document.querySelector('#pair-dialog .close')")
        tab.wait("!document.querySelector('#pair-dialog[open]')")
        _choose(tab, "Camera", "3")
        tab.wait("document.querySelector('#listed .probe figcaption')?.innerText.endsWith('c3')")

        _open(tab, "Upload")
        (tmp_path / "note.png").write_bytes(b"no picture")
        tab.wait("document.querySelector('input[type=file]')")
        tab.upload("input[type=file]", tmp_path / "note.png")
        told = tab.wait("document.querySelector('#found .note')?.innerText")
        assert "image note.png cannot be read: not an image" in told
        tab.press("document.querySelector('button[aria-label=Clear]')")
        tab.wait("!document.querySelector('#found .note')")
        tab.wait("document.querySelector('input[type=file]')")
        exploration = Exploration(trained)
        picture = exploration._pictures.select("gallery", [3]).encoded(0)
        (tmp_path / "person.png").write_bytes(picture)
        tab.upload("input[type=file]", tmp_path / "person.png")
        first = tab.wait("document.querySelector('#found .ranking button')?.title")
        assert first.startswith(str(exploration.features["gallery_names"][3]))
        assert abs(float(first.rpartition(" ")[2])) < 1e-4

        _open(tab, "Threshold")
        tab.wait("document.querySelector('#errors svg')")
        before = tab.ask("document.querySelector('#errors').innerText")
        assert "false accepts of" in before
        assert "misses of" in before
        slide = (
            "(() => { const e = document.querySelector('#threshold input[type=range]');"
            "e.value = e.max; e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        tab.ask(slide)
        tab.wait("/\\b0 misses/.test(document.querySelector('#errors').innerText)")

        _open(tab, "Map")
        tab.wait("document.querySelectorAll('#placed circle').length > 50")
        tab.press("document.querySelector('input[type=radio][value=identity]')")
        tab.wait("document.querySelector('#placed title').textContent.includes('pid')")

        _open(tab, "Hard pairs")
        link = tab.wait("document.querySelector('#pairs .export')?.href")
        table = base64.b64decode(link.partition("base64,")[2]).decode()
        assert table == exploration.write_hard_pairs()
        tab.press("document.querySelector('#pairs .ranking button')")
        tab.wait("document.querySelector('#pair-dialog[open] .bar')")

        assert tab.ask("document.documentElement.scrollWidth") <= width
        assert tab.requests
        assert [url for url in tab.requests if not url.startswith(address)] == []
        assert [said for said in tab.complaints if said != _GRADIO_SAYS] == []


def _get(address, path, **options):
    request = urllib.request.Request(address + path, **options)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.slow
@needs_page
def test_no_file_is_served(address, trained, tmp_path):
    (tmp_path / "secret.png").write_bytes(encode())
    for file in (tmp_path / "secret.png", trained / "config.json", ROOT / "README.md", "README.md"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _get(address, f"gradio_api/file={file}")
        refused.value.close()
        assert refused.value.code in (403, 404), file
    # Nor is one taken that a forged upload names: it would be shown as a thumbnail.
    config = json.loads(_get(address, "config"))
    files = [part["id"] for part in config["components"] if part["type"] == "file"]
    (upload,) = (f["id"] for f in config["dependencies"] if f["inputs"][:1] == files)
    forged = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [forged, 10], "fn_index": upload, "session_hash": "forged"}
    headers = {"Content-Type": "application/json"}
    _get(address, "gradio_api/queue/join", data=json.dumps(body).encode(), headers=headers)
    said = _get(address, "gradio_api/queue/data?session_hash=forged")
    assert '"success":false' in said.replace(" ", "")
    assert "data:image" not in said

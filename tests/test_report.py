"""The report: what it says agrees with the results, and a browser shows it without complaint."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mros_jax import console
from mros_jax.inspection import ranking
from mros_jax.inspection.parts import split_distance
from mros_jax.models.outputs import Part
from mros_jax.report import __main__ as command
from mros_jax.report import build, write_report
from mros_jax.retrieval import compute_distances, descriptors, evaluate
from mros_jax.runs.run import Run
from scripts import chromium, shoot_report
from tests import browser
from tests.runs import copy_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

needs_chromium = pytest.mark.skipif(
    chromium.find_chromium() is None,
    reason="no chromium, chromium-browser or google-chrome on the PATH",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    return copy_run(tmp_path_factory.mktemp("runs") / "small", cache_dir)


@pytest.fixture(scope="module")
def report(run):
    return write_report(run, queries=2)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to damage."""
    return shutil.copytree(run, tmp_path / "copy")


def test_is_one_small_file_that_fetches_nothing(report):
    text = report.read_text()
    assert report.name == "report.html"
    assert len(text.encode()) < 5_000_000
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_states_scores_protocol_and_provenance(run, report):
    text = report.read_text()
    results = json.loads((run / "results.json").read_text())["results"]
    for result in results:
        assert f"{100 * result['mAP']:.1f}" in text
        assert f"{100 * result['cmc'][0]:.1f}" in text
    assert "84.2" in text  # the paper's
    assert "93.5" in text
    assert "dataset: synthetic, not market1501" in text
    assert "network.trunk: tiny, not resnet50" in text
    provenance = json.loads((run / "run.json").read_text())
    assert provenance["versions"]["jax"] in text
    assert "rerank_options.k" in text
    assert "optimizer.network.weight_decay" in text


def test_each_descriptor_of_a_network_with_exits(copy, report):
    assert "Each descriptor by itself" not in report.read_text()
    results = json.loads((copy / "results.json").read_text())
    plain = results["results"][0]
    entry = {key: plain[key] for key in ("mINP", "cmc", "protocol")}
    exits = [
        {**entry, "name": "stage1", "size": 128, "multiply_adds": 513_671_168, "mAP": 0.1234},
        {**entry, "name": "descriptor", "size": 128, "multiply_adds": 10**10, "mAP": plain["mAP"]},
    ]
    (copy / "results.json").write_text(json.dumps({**results, "exits": exits}))
    text = write_report(copy, queries=1, top=1).read_text()
    assert "Each descriptor by itself" in text
    assert re.search(r"<th>stage1</th><td>128</td><td>513\.7 M</td><td>12\.3</td>", text)
    assert "10,000.0 M" in text


def test_gives_differences_where_the_protocol_is_the_papers(copy):
    assert "difference<" not in write_report(copy).read_text()
    results = json.loads((copy / "results.json").read_text())
    own = {"dataset": "market1501", "num_query": 3368, "num_gallery": 15913, "num_junk": 3819}
    for result in results["results"]:
        result["protocol"] |= {**own, "flip_test": False, "crops": "none"}
        if result["rerank"]:
            result["protocol"]["rerank_options"]["k"] = 25
    results["results"][0]["mAP"] = 0.852
    results["results"][1]["cmc"][0] = 0.945
    (copy / "results.json").write_text(json.dumps(results))
    config = json.loads((copy / "config.json").read_text())
    config["network"]["trunk"] = "resnet50"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "features.npz").unlink()
    text = write_report(copy).read_text()
    assert "measured otherwise" not in text
    assert ">+1.0<" in text
    assert ">-1.0<" in text


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_browser_draws_every_picture(report, tmp_path, width, dark):
    seen = browser.inspect(report, tmp_path, width=width, dark=dark)
    assert seen["errors"] == []
    assert seen["fetched"] == []
    assert len(seen["images"]) > 50
    assert min(seen["images"]) > 0
    names = {"loss", "rate", "metrics", "speed", "cmc", "distances-plain", "distances-ecn"}
    assert seen["charts"].keys() == names
    for w, h, shapes in seen["charts"].values():
        assert w > 250
        assert h > 120
        assert shapes > 5
    assert seen["width"] == width
    assert seen["scrollWidth"] <= width, "the page scrolls sideways"
    assert "cosine distance" in seen["dialog"]
    assert (sum(seen["background"]) < 200) == dark


@pytest.mark.slow
@needs_chromium
def test_browser_sees_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><html><head></head><body><img src='data:image/png;base64,AAAA'>"
        "<script>console.error('loud'); undefined.x;</script></body></html>"
    )
    seen = browser.inspect(page, tmp_path, width=600)
    assert seen["images"] == [0]
    assert any("loud" in error for error in seen["errors"])
    assert any("IMG failed" in error for error in seen["errors"])
    assert any("undefined" in error for error in seen["errors"])


@pytest.mark.slow
@needs_chromium
def test_pictures_of_the_report(report, tmp_path):
    out = tmp_path / "top.png"
    shoot_report.shoot(report, out, width=1000, height=700)
    with Image.open(out) as image:
        assert image.size == (1000, 700)
        colors = image.convert("RGB").getcolors(700_000)
        assert colors is not None
        assert len(colors) > 200
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    shoot_report.shoot(report, one, lists=[0])
    shoot_report.shoot(report, two, lists=[0, 3])
    with Image.open(one) as first, Image.open(two) as second:
        assert 100 < first.height < second.height < 1000
        assert first.width == second.width == 1280


def test_ranked_lists_agree_with_the_evaluation(run):
    loaded = Run.open(run)
    arrays = loaded.features
    assert arrays is not None
    for result in loaded.rankings:
        ranked = ranking.Ranking(arrays, result)
        scan = ranked.scan()
        valid = result["valid_queries"]
        np.testing.assert_allclose(scan.ap[valid], result["ap"], atol=1e-9)
        rows = ranked.rows(np.array(valid))
        for query, row, first in zip(valid, rows, result["first_match_rank"], strict=True):
            entries = ranked.list_top(query, row, 10_000, most_junk=10_000)
            matches = [e.rank for e in entries if e.status == "match"]
            assert matches[0] == first
            counted = [e.rank for e in entries if e.rank]
            assert counted == list(range(1, len(counted) + 1))
            for e in entries:
                pid, camid = arrays["gallery_pids"][e.index], arrays["gallery_camids"][e.index]
                own = pid == arrays["query_pids"][query]
                uncounted = pid == -1 or (own and camid == arrays["query_camids"][query])
                assert (e.status == "junk") == uncounted
                assert (e.status == "match") == (own and not uncounted)
                assert (e.status == "distractor") == (pid == 0)


def test_lists_stop_at_top_and_limit_junk(run):
    loaded = Run.open(run)
    assert loaded.features is not None
    ranked = ranking.Ranking(loaded.features, loaded.rankings[0])
    row = ranked.rows(np.array([0]))[0]
    entries = ranked.list_top(0, row, 4, most_junk=1)
    assert [e.rank for e in entries if e.rank] == [1, 2, 3, 4]
    assert sum(e.status == "junk" for e in entries) <= 1


def _features(gallery_pids, gallery_camids, distances):
    """One query of pid 1 in camera 1; unit vectors at the given cosine distances."""
    cosine = 1 - np.asarray(distances, np.float32)
    gallery = np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1)
    return {
        "query_features": np.array([[1, 0]], np.float32),
        "query_pids": np.array([1]),
        "query_camids": np.array([1]),
        "gallery_features": gallery,
        "gallery_pids": np.array(gallery_pids),
        "gallery_camids": np.array(gallery_camids),
    }


_PROTOCOL = {
    "metric": "cosine",
    "normalize": True,
    "ap": "standard",
    "junk": "dropped",
    "junk_pid": -1,
    "distractor_pid": 0,
}


def test_camera_pairs_by_hand():
    #                       own camera, other, match c2, wrong c2, match c3, junk, match c2
    pids, cams = [1, 2, 1, 3, 1, -1, 1], [1, 2, 2, 2, 3, 2, 2]
    arrays = _features(pids, cams, [0.01, 0.1, 0.2, 0.3, 0.4, 0.05, 0.5])
    result = {"name": "plain", "rerank": None, "protocol": _PROTOCOL}
    scan = ranking.Ranking(arrays, result).scan()
    # In camera 2: wrong, match, wrong, match; in camera 3: match; in all: ranks 2, 4, 5.
    pairs = scan.pairs
    assert pairs.query_camids.tolist() == [1, 1]
    assert pairs.gallery_camids.tolist() == [2, 3]
    assert pairs.queries.tolist() == [1, 1]
    np.testing.assert_allclose(pairs.mAP, [(1 / 2 + 2 / 4) / 2, 1])
    np.testing.assert_allclose(pairs.rank1, [0, 1])
    np.testing.assert_allclose(scan.ap, [(1 / 2 + 2 / 4 + 3 / 5) / 3])
    np.testing.assert_allclose(np.sort(scan.same), [0.2, 0.4, 0.5], atol=1e-6)
    np.testing.assert_allclose(np.sort(scan.different), [0.1, 0.3], atol=1e-6)


def test_a_camera_for_each_image_makes_a_sentence():
    num = 40
    pairs = ranking.Pairs(np.arange(num), np.arange(num) + num, np.ones(num, int), *np.eye(num)[:2])
    table = build._tabulate(pairs)
    assert set(table) == {"summary"}
    assert "40 cameras of queries and 40 of the gallery make 40 pairs" in table["summary"]
    few = ranking.Pairs(*(array[:30] for array in dataclasses.astuple(pairs)))
    table = build._tabulate(few)
    assert table["counts"].shape == (30, 30)
    assert table["rows"][0][1][0] == 1


def test_scan_samples_many_distances(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{name}": values
        for split, num in (("query", 60), ("gallery", 300))
        for name, values in (
            ("features", rng.standard_normal((num, 8), np.float32)),
            ("pids", rng.integers(1, 5, num)),
            ("camids", np.arange(num)),
        )
    }
    monkeypatch.setattr(ranking, "_SAMPLES", 600)
    monkeypatch.setattr(ranking, "_BLOCK", 3000)
    result = {"name": "plain", "rerank": None, "protocol": _PROTOCOL}
    scan = ranking.Ranking(arrays, result).scan()
    expected = evaluate(*(arrays[name] for name in descriptors.ARRAYS))
    np.testing.assert_allclose(scan.ap[expected.valid_queries], expected.ap, rtol=1e-12)
    assert len(scan.same) == 600
    assert 400 < len(scan.different) < 800


@pytest.mark.parametrize(("metric", "normalize"), [("euclidean", True), ("euclidean", False)])
def test_shows_the_distances_of_the_metric(run, metric, normalize):
    loaded = Run.open(run)
    assert loaded.features is not None
    result = {**loaded.rankings[0]}
    result["protocol"] = {**result["protocol"], "metric": metric, "normalize": normalize}
    rows = ranking.Ranking(loaded.features, result).rows(np.arange(2))
    expected = compute_distances(
        loaded.features["query_features"][:2],
        loaded.features["gallery_features"],
        metric=metric,
        normalize=normalize,
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_distance():
    rng = np.random.default_rng(0)
    made = [Part("t3", 4)] * 5 + [Part("t4", 8)] * 5
    a, b = rng.normal(size=(2, 60))
    parts = split_distance(a, b, made)
    assert {group: len(p) for group, p in parts.items()} == {"t3": 5, "t4": 5}
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert sum(map(sum, parts.values())) == pytest.approx(1 - cosine, abs=1e-12)
    unit = a / np.linalg.norm(a), b / np.linalg.norm(b)
    second = slice(4, 8)
    assert parts["t3"][1] == pytest.approx(((unit[0] - unit[1])[second] ** 2).sum() / 2)
    with pytest.raises(ValueError, match="60 numbers"):
        split_distance(a, b, [Part("t4", 8)] * 5)


def test_chooses_best_worst_and_random_queries():
    result = {
        "ap": [0.5, 0.9, 0.9, 0.1, 0.1, 0.3, 0.8, 0.2],
        "first_match_rank": [1, 1, 2, 9, 4, 3, 1, 5],
        "query_pids": [1, 2, 2, 3, 4, 5, 6, 7],
        "valid_queries": [10, 11, 12, 13, 14, 15, 16, 17],
    }
    chosen = ranking.choose_queries(result, 2)
    assert [query for query, _, _ in chosen["best"]] == [11, 16]  # 12 is of the same identity
    assert [query for query, _, _ in chosen["worst"]] == [13, 14]
    assert len({query for group in chosen.values() for query, _, _ in group}) == 6
    assert ranking.choose_queries(result, 2) == chosen
    others = [ranking.choose_queries(result, 2, seed)["random"] for seed in range(5)]
    assert any(other != chosen["random"] for other in others)


def test_comes_without_pictures_when_the_data_have_moved(copy):
    config = json.loads((copy / "config.json").read_text())
    config["dataset"] |= {"name": "market1501", "root": "/nowhere/Market"}
    (copy / "config.json").write_text(json.dumps(config))
    text = write_report(copy).read_text()
    assert "there are no pictures" in text
    assert "/nowhere/Market" in text
    assert "<img" not in text
    assert 'class="ranking"' in text


def test_comes_without_features(copy):
    (copy / "features.npz").unlink()
    (copy / "timing.jsonl").unlink()
    text = write_report(copy).read_text()
    assert "no features.npz" in text
    assert 'class="ranking"' not in text
    assert 'data-chart="cmc"' in text


def test_says_when_features_are_not_those_of_the_results(copy):
    with np.load(copy / "features.npz") as file:
        arrays = dict(file)
    arrays["query_features"] = arrays["query_features"][::-1]
    np.savez(copy / "features.npz", **arrays)
    assert "from another" in write_report(copy).read_text()


def test_report_is_the_same_each_time(run, report, tmp_path):
    again = write_report(run, tmp_path / "again.html", queries=2)
    assert again.read_text() == report.read_text()


def test_command(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert command.main([str(run), "--out", str(out), "--queries", "1", "--top", "3"]) == 0
    assert pathlib.Path(capsys.readouterr().out.strip()) == out
    assert out.read_text().count('class="query card"') == 3
    assert list(tmp_path.iterdir()) == [out]


def test_refuses_what_is_no_run(tmp_path, copy, capsys):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        write_report(tmp_path)
    (copy / "results.json").unlink()
    assert console.run(command.main, [str(copy)]) == 2
    advice = f"python -m mros_jax.evaluate --run {copy} --out {copy / 'results.json'}"
    assert advice in capsys.readouterr().err
    with pytest.raises(ValueError, match="top is 0"):
        write_report(copy, top=0)

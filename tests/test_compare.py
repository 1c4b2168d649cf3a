"""Runs beside the paper's tables."""

import csv
import io
import json

import numpy as np
import pytest

from mros_jax import compare, config, console
from mros_jax.retrieval import evaluate_distances
from mros_jax.runs import paper
from tests.training import ROOT

MARKET = {
    "dataset": "market1501",
    "num_query": 3368,
    "num_gallery": 15913,
    "num_junk": 3819,
    "ap": "standard",
    "flip_test": False,
    "crops": "none",
    "descriptor": "descriptor",
    "normalize": True,
    "rerank": None,
    "rerank_options": None,
    "commit": "abc",
}
ECN = {"k": 25, "t": 3, "q": 8, "method": "rankdist", "neighbors": "exact"}


def make_entry(mAP=0.84, rerank=None, **protocol):
    options = ECN if rerank == "ecn" else None
    changes = {"rerank": rerank, "rerank_options": options, **protocol}
    return {
        "name": rerank or "plain",
        "rerank": rerank,
        "mAP": mAP,
        "mINP": mAP / 2,
        "cmc": [min(mAP + 0.1, 0.955), *([0.96] * 8), 0.98, *([0.99] * 40)],
        "protocol": MARKET | changes,
    }


def write_run(path, entries, system="mros-IV", seed=0, config=None):
    path.mkdir()
    run = {"system": system, "seed": seed, "step": 1, "epoch": 1, "commit": "abc"}
    for entry in entries:
        entry["protocol"]["seed"] = seed
    results = {"format": 1, "run": run, "dataset": {"name": "market1501"}, "results": entries}
    (path / "results.json").write_text(json.dumps(results))
    if config is not None:
        whole = {"name": system, "seed": seed, "dataset": {}, "input": {}} | config
        (path / "config.json").write_text(json.dumps(whole))
    return str(path)


def call(*argv, capsys):
    status = console.run(compare.main, argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_papers_tables_are_whole():
    tables = paper.load_tables()["table"]
    sizes = {table["number"]: len(table["row"]) for table in tables}
    assert sizes == {1: 4, 2: 10, 3: 8, 4: 11, 5: 11, 6: 1}
    rows = {(t["number"], r["name"]): r for t in tables for r in t["row"]}
    assert rows[2, "Proposed MROS"]["rank10"] == 98.7
    assert rows[3, "Proposed MROS"]["mAP"] == 93.5
    assert rows[1, "IV: complete MROS"]["rank1"] == 94.4
    assert rows[3, "GSRW"] == {
        "name": "GSRW", "mAP": 82.5, "rank1": 92.7, "rank5": 96.9, "rank10": 98.1
    }  # fmt: skip
    assert "rank5" not in rows[2, "MFBN"]


def test_every_system_has_a_row_or_a_reason_for_none():
    """Of every variant of every config; and no row is of a system that is none."""
    tables = paper.load_tables()
    systems = {
        config.read(path, variant or None).name
        for path in config.list_configs()
        for variant in config.read_variants(path)
    }
    unpublished = set(tables["unpublished"])
    published = {name for name in systems if paper.find_rows(name, tables)}
    assert published | unpublished == systems
    assert not published & unpublished
    assert all(len(reason) > 20 for reason in tables["unpublished"].values())
    named = {row["system"] for table in tables["table"] for row in table["row"] if "system" in row}
    assert named == published
    assert set(tables["config"]) == published


def test_a_row_is_measured_as_its_config_tests():
    """Else training would end in a number that is not to be compared with what was published."""
    tables = paper.load_tables()
    for path in config.list_configs():
        for variant in config.read_variants(path):
            read = config.read(path, variant or None)
            rows = paper.find_rows(read.name, tables)
            plain = [pair for pair in rows if "rerank" not in pair[0]]
            # GSRW's numbers are of its re-ranking alone.
            measured = plain or [pair for pair in rows if pair[0]["rerank"] in read.eval.rerank]
            protocols = [tables["protocol"] | row.get("protocol", {}) for _, row in measured]
            fields = ("ap", "flip_test", "crops", "normalize", "metric")
            tested = {name: read.eval[name] for name in fields}
            assert not rows or any(
                all(row.get(name, value) == value for name, value in tested.items())
                for row in protocols
            ), read.name


def test_notes_of_misprints_are_shown(capsys):
    text = call(str(ROOT / "tests" / "data" / "retrieval_a.npz"), capsys=capsys)[1]
    assert "MROS's paper prints mAP 81.9, most likely a misprint" in text


def test_a_run_stands_beside_its_row(tmp_path, capsys):
    run = write_run(tmp_path / "a", [make_entry(0.85), make_entry(0.93, "ecn")])
    status, out, _ = call(run, "--format=csv", capsys=capsys)
    assert status == 0
    ours = [row for row in read_csv(out) if row["source"] == run]
    assert [row["table"] for row in ours] == ["1", "2", "3"]
    first, second, third = ours
    assert float(first["mAP_difference"]) == pytest.approx(0.8)
    assert float(second["rank10_difference"]) == pytest.approx(98 - 98.7)
    assert float(third["mAP_difference"]) == pytest.approx(-0.5)
    assert first["rank5_difference"] == ""
    assert all(row["mismatches"] == "" for row in ours)


def test_settings_find_their_own_row(tmp_path, capsys):
    run = write_run(tmp_path / "a", [make_entry(0.84)], system="mros-III")
    rows = read_csv(call(run, "--format=csv", capsys=capsys)[1])
    at = next(i for i, row in enumerate(rows) if row["source"] == run)
    assert rows[at - 1]["name"].startswith("III:")
    assert float(rows[at]["mAP_difference"]) == pytest.approx(0.0)


def test_seeds_are_averaged(tmp_path, capsys):
    runs = [
        write_run(tmp_path / str(seed), [make_entry(mAP)], seed=seed)
        for seed, mAP in enumerate((0.82, 0.84, 0.86))
    ]
    text = call(*runs, capsys=capsys)[1]
    assert "84.00 ± 2.00 (-0.2)" in text
    assert "mean of 3 seeds" in text
    ours = [
        row for row in read_csv(call(*runs, "--format=csv", capsys=capsys)[1]) if row["mAP_std"]
    ]
    assert [row["runs"] for row in ours] == ["3", "3"]
    assert float(ours[0]["mAP_std"]) == pytest.approx(np.std([82, 84, 86], ddof=1))


@pytest.mark.parametrize("difference", ["protocol", "config", "system"])
def test_what_differs_is_not_averaged(tmp_path, capsys, difference):
    runs = [
        write_run(
            tmp_path / str(i),
            [make_entry(0.8, ap=["standard", "trapezoid"][i * (difference == "protocol")])],
            system=["mros-IV", "mros-III"][i * (difference == "system")],
            seed=i,
            config={
                "seed": i,
                "num_epochs": 120 - i * (difference == "config"),
                "name": "mros-IV",
            },
        )
        for i in range(2)
    ]
    rows = read_csv(call(*runs, "--format=csv", capsys=capsys)[1])
    assert {row["runs"] for row in rows if row["source"] != "paper"} == {"1"}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"ap": "trapezoid"}, "ap: trapezoid, not standard"),
        ({"flip_test": True}, "flip_test: True, not False"),
        ({"crops": "ten"}, "crops: ten, not none"),
        ({"descriptor": "stage1"}, "descriptor: stage1, not descriptor"),
        ({"dataset": "msmt17"}, "dataset: msmt17, not market1501"),
        ({"num_query": 100}, "num_query: 100, not 3368"),
        ({"num_junk": 0}, "num_gallery_and_junk: 15913, not 19732"),
        ({"normalize": False}, "normalize: False, not True"),
    ],
)
def test_another_protocol_is_flagged(tmp_path, capsys, changes, flag):
    run = write_run(tmp_path / "a", [make_entry(0.8, **changes)])
    text = call(run, capsys=capsys)[1]
    assert f"NOT COMPARABLE: {flag}" in text
    assert f"NOT COMPARABLE: {flag}" in call(run, "--format=markdown", capsys=capsys)[1]


def test_a_system_beside_its_own_row(tmp_path, capsys):
    run = write_run(tmp_path / "a", [make_entry(0.826)], system="spherereid")
    rows = read_csv(call(run, "--format=csv", capsys=capsys)[1])
    places = [i for i, row in enumerate(rows) if row["name"] == "SphereReID"]
    ours = [i for i, row in enumerate(rows) if row["name"] == "ours, spherereid"]
    assert ours == [i + 1 for i in places]
    assert float(rows[ours[0]]["mAP_difference"]) == pytest.approx(82.6 - 83.6)
    assert rows[ours[0]]["mismatches"] == ""


def test_a_row_with_a_protocol_of_its_own(tmp_path, capsys):
    own = {"metric": "euclidean", "normalize": False, "ap": "trapezoid", "crops": "ten"}
    for changes, mismatches in ((own, ""), (own | {"crops": "none"}, "crops: none, not ten")):
        run = write_run(tmp_path / changes["crops"], [make_entry(0.68, **changes)], system="trinet")
        rows = read_csv(call(run, "--format=csv", capsys=capsys)[1])
        [row] = [row for row in rows if row["table"] == "4" and row["source"] != "paper"]
        assert float(row["mAP_difference"]) == pytest.approx(68 - 69.14)
        assert row["mismatches"] == mismatches


def test_a_reconstruction_is_never_the_system(tmp_path, capsys):
    """No row is its own; where it stands at all, it says what it is."""
    run = write_run(tmp_path / "a", [make_entry(0.83)], system="tbn_plus-reconstruction")
    rows = read_csv(call(run, "--format=csv", capsys=capsys)[1])
    ours = [i for i, row in enumerate(rows) if row["source"] != "paper"]
    assert {rows[i]["name"] for i in ours} == {"ours, tbn_plus-reconstruction"}
    assert all(rows[i - 1]["name"] != "TBN+" for i in ours)
    named = {row.get("system") for table in paper.load_tables()["table"] for row in table["row"]}
    assert not any(name.startswith("tbn") for name in named if name)


def test_a_system_whose_rows_are_of_mirrored_images(tmp_path, capsys):
    entries = [make_entry(0.84, flip_test=True), make_entry(0.93, "k_reciprocal", flip_test=True)]
    entries[1]["protocol"]["rerank_options"] = {"k1": 20, "k2": 6, "lambda_value": 0.3}
    run = write_run(tmp_path / "a", entries, system="mfbn")
    rows = read_csv(call(run, "--format=csv", capsys=capsys)[1])
    ours = {row["table"]: row for row in rows if row["source"] != "paper"}
    assert float(ours["2"]["mAP_difference"]) == pytest.approx(84.0 - 84.9)
    assert float(ours["5"]["mAP_difference"]) == pytest.approx(93.0 - 93.2)
    assert ours["2"]["mismatches"] == ours["5"]["mismatches"] == ""


def test_a_system_that_is_reranked_by_its_own_network(tmp_path, capsys):
    raw = {"metric": "euclidean", "normalize": False}
    entries = [make_entry(0.7, **raw), make_entry(0.83, "gsrw", **raw)]
    entries[1]["protocol"]["rerank_options"] = {"top": 75, "alpha": 0.95}
    run = write_run(tmp_path / "a", entries, system="gsrw")
    rows = read_csv(call(run, "--format=csv", capsys=capsys)[1])
    ours = {row["table"]: row for row in rows if row["source"] != "paper"}
    assert float(ours["6"]["mAP_difference"]) == pytest.approx(83.0 - 82.5)
    assert ours["6"]["mismatches"] == ""
    entries[1]["protocol"]["rerank_options"]["top"] = 50
    run = write_run(tmp_path / "b", entries, system="gsrw")
    assert "top: 50, not 75" in call(run, capsys=capsys)[1]


def test_other_reranking_and_other_network_are_flagged(tmp_path, capsys):
    entries = [make_entry(0.8, "k_reciprocal"), make_entry(0.8, "ecn")]
    entries[1]["protocol"]["rerank_options"] = ECN | {"k": 10}
    config = {"name": "mros-IV", "network": {"trunk": "tiny", "num_stripes": 6}}
    text = call(write_run(tmp_path / "a", entries, config=config), capsys=capsys)[1]
    assert "rerank: k_reciprocal, not ecn" in text
    assert "k: 10, not 25" in text
    assert "network.trunk: tiny, not resnet50" in text


def test_markdown_is_a_table(tmp_path, capsys):
    out = call(write_run(tmp_path / "a", [make_entry()]), "--format=markdown", capsys=capsys)[1]
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {7}
    assert out.count("### Table") == 6


def make_result(seed, shift):
    rng = np.random.default_rng(seed)
    pids = np.repeat(np.arange(1, 16), 3)
    distance = rng.standard_normal((45, 45)) - shift * (pids[:, None] == pids)
    result = evaluate_distances(distance, pids, pids, [1] * 45, [2] * 45)
    return make_entry() | result.to_dict() | {"protocol": dict(MARKET)}


def test_paired_test_between_two_runs(tmp_path, capsys):
    runs = [
        write_run(tmp_path / str(i), [make_result(i, shift)]) for i, shift in enumerate((0.5, 2.0))
    ]
    status, out, _ = call(*runs, "--paired", "--format=csv", "--samples=500", capsys=capsys)
    assert status == 0
    row = read_csv(out)[0]
    assert (row["ranking"], row["metric"]) == ("plain", "mAP")
    assert float(row["difference"]) > float(row["low"]) > 0
    assert float(row["p_value"]) < 0.05
    assert "minus" in call(*runs, "--paired", capsys=capsys)[1]


def test_features_files_are_compared(capsys):
    golden = str(ROOT / "tests" / "data" / "retrieval_a.npz")
    status, out, _ = call(golden, golden, "--paired", "--format=csv", capsys=capsys)
    assert status == 0
    assert float(read_csv(out)[0]["p_value"]) == 1


def test_clear_errors(tmp_path, capsys):
    good = write_run(tmp_path / "good", [make_result(0, 1)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "new.json").write_text('{"format": 99, "run": {}, "results": []}')
    cases = {
        ("empty",): "has no results.json",
        ("nowhere",): "does not exist",
        ("text.json",): "is not JSON",
        ("other.json",): "is no results.json",
        ("new.json",): "has format 99; this version reads 1",
        ("good", "--paired"): "needs two results, got 1",
        ("good", "--paper=nowhere.toml"): "--paper names a file like",
    }
    for (name, *flags), message in cases.items():
        status, _, err = call(str(tmp_path / name), *flags, capsys=capsys)
        assert status == 2
        assert message in err
    other = write_run(tmp_path / "other", [make_entry(0.8)])
    status, _, err = call(good, other, "--paired", capsys=capsys)
    assert status == 2
    assert "this result lacks" in err

"""The evaluation command: files in, numbers out; descriptors of a run kept and reused."""

import csv
import dataclasses
import errno
import io
import json
import pathlib
import re
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mros_jax import compare, console, evaluate
from mros_jax import config as configs
from mros_jax.data.images import EncodedImages
from mros_jax.data.splits import Dataset, Split
from mros_jax.data.synthetic import dataset as synthetic
from mros_jax.files import write_json
from mros_jax.retrieval import descriptors
from mros_jax.runs import provenance, results
from mros_jax.runs.features import fingerprint
from mros_jax.runs.run import FORMAT
from tests.runs import make_run

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "retrieval_a.npz"


def make_split(name, num, rng, people=4):
    return Split(
        name=name,
        names=np.array([f"{name}_{i:03}.jpg" for i in range(num)]),
        pids=(np.arange(num) % people + 1).astype(np.int32),
        camids=rng.integers(1, 4, num).astype(np.int32),
        sequences=np.zeros(num, np.int32),
        images=encode_all(np.arange(num) % people),
    )


def encode_all(people):
    pictures = [encode(pixels) for pixels in make_pixels(people)]
    return EncodedImages(pictures.__getitem__, len(pictures))


def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def make_pixels(people):
    """Noise, with a bright row for each person."""
    images = np.random.default_rng(0).integers(0, 30, (len(people), 8, 4, 3))
    images[np.arange(len(people)), people] = 200
    return images.astype(np.uint8)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(1)
    return Dataset(
        name="tiny",
        train=make_split("train", 4, rng),
        query=make_split("query", 12, rng),
        gallery=make_split("gallery", 40, rng),
        pid_of_label=np.arange(1, 5, dtype=np.int32),
    )


class FakeModel:
    """Stands for a trained network; counts what it is asked."""

    def __init__(self, checkpoint_id="last-20-abc"):
        self.checkpoint_id = checkpoint_id
        self.calls = []
        self.exits = {}  # name -> multiply-adds; sees as many numbers of each image
        self.heads = {}

    def embed_all(self, images, *, batch_size, flip_test, crops, progress, together):
        self.calls.append((len(images), batch_size, flip_test))
        pixels = images.reshape(len(images), -1).astype(np.float32)
        exits = {name: pixels[:, :size] for name, size in self.exits.items()}
        return {"descriptor": pixels + 10 * flip_test + 1 + (crops == "ten"), **exits}

    def count_multiply_adds(self):
        return {**self.exits, "descriptor": 10**6}

    def fold_heads(self):
        return self.heads


CONFIG = {
    "seed": 3,
    "dataset": {"name": "tiny", "root": None, "cache_dir": None, "on_bad_image": "error"},
    "input": {"height": 8, "width": 4, "interpolation": "bilinear"},
    "name": "mros-IV",
    "eval": configs.base().eval.to_dict(),
}


@pytest.fixture
def run(tmp_path, dataset, monkeypatch):
    """A run directory, with the model that it holds."""
    state = types.SimpleNamespace(model=FakeModel(), path=tmp_path / "run", dataset=dataset)
    state.path.mkdir()
    record = {"format": FORMAT, **provenance.describe_run(dataset, fingerprint(dataset))}
    write_json(state.path / "run.json", record)
    write_json(state.path / "config.json", CONFIG)
    steps = [{"kind": "train", "step": s, "epoch": s // 10} for s in range(1, 21)]
    (state.path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    monkeypatch.setattr(evaluate, "load_model", lambda run, checkpoint: state.model)
    monkeypatch.setattr(configs, "load_dataset", lambda config: state.dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return state


def call(*argv, capsys):
    status = console.run(evaluate.main, [*argv, "--no_progress"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_checkpoint_is_evaluated_and_its_descriptors_kept(run, capsys):
    argv = ("--run", str(run.path), "--rerank=ecn", "--json", "--batch_size=16")
    options = '--rerank_options={"ecn": {"k": 10, "t": 2, "q": 4}}'
    status, out, _ = call(*argv, options, capsys=capsys)
    assert status == 0
    results = json.loads(out)
    assert run.model.calls == [(12, 16, False), (40, 16, False)]
    assert results["format"] == 1
    assert results["run"]["system"] == "mros-IV"
    assert (results["run"]["step"], results["run"]["epoch"]) == (20, 2)
    assert results["run"]["seed"] == 3
    assert results["dataset"]["name"] == "tiny"
    assert results["dataset"]["num_gallery"] == 40
    plain, ecn = results["results"]
    assert (plain["name"], plain["rerank"]) == ("plain", None)
    assert ecn["protocol"]["rerank_options"]["k"] == 10
    for entry in (plain, ecn):
        assert entry["mAP"] > 0.9
        assert len(entry["cmc"]) == 50
        assert entry["protocol"]["flip_test"] is False
        assert entry["protocol"]["dataset"] == "tiny"
        assert entry["protocol"]["seed"] == 3
        assert len(entry["ap"]) == len(entry["first_match_rank"]) == len(entry["valid_queries"])

    saved = descriptors.load_features(run.path / "features.npz")
    assert str(saved["checkpoint_id"]) == "last-20-abc"
    assert saved["query_names"][0] == "query_000.jpg"
    again = call(*argv, options, capsys=capsys)[1]
    assert run.model.calls == [(12, 16, False), (40, 16, False)]
    assert json.loads(again)["results"] == results["results"]


def test_exits_of_a_network_are_evaluated_too(run, capsys):
    run.model.exits = {"late": 24, "early": 12}
    argv = ("--run", str(run.path))
    results = json.loads(call(*argv, "--json", capsys=capsys)[1])
    exits = {entry["name"]: entry for entry in results["exits"]}
    assert list(exits) == ["early", "late", "descriptor"]  # the cheapest first
    assert [entry["multiply_adds"] for entry in exits.values()] == [12, 24, 10**6]
    assert [entry["size"] for entry in exits.values()] == [12, 24, 96]
    assert exits["early"]["mAP"] < exits["late"]["mAP"] < exits["descriptor"]["mAP"] == 1
    assert exits["descriptor"]["mAP"] == results["results"][0]["mAP"]
    assert [entry["protocol"]["descriptor"] for entry in exits.values()] == list(exits)
    _, table, _ = call(*argv, capsys=capsys)
    assert "Each descriptor by itself" in table
    assert f"{100 * exits['early']['mAP']:.2f}" in table
    assert "1.0 M" in table

    # One of them in full: from the run and from its file, re-ranked.
    options = ("--rerank=aqe", "--descriptor=early")
    for source in (argv, ("--features", str(run.path / "features.npz"))):
        _, out, _ = call(*source, *options, "--json", capsys=capsys)
        one = json.loads(out)
        plain, aqe = one["results"]
        assert plain["mAP"] == exits["early"]["mAP"]
        assert plain["protocol"]["descriptor"] == aqe["protocol"]["descriptor"] == "early"
        assert "exits" not in one
    assert "descriptor early, commit" in call(*argv, *options, capsys=capsys)[1]
    assert len(run.model.calls) == 2  # kept

    status, _, err = call(*argv, "--descriptor=stage9", capsys=capsys)
    assert status == 2
    assert "no descriptor 'stage9'; expected one of descriptor, early, late" in err


def test_a_network_without_exits_has_no_table_of_them(run, capsys):
    argv = ("--run", str(run.path))
    assert "exits" not in json.loads(call(*argv, "--json", capsys=capsys)[1])
    assert "by itself" not in call(*argv, capsys=capsys)[1]
    status, _, err = call(*argv, "--descriptor=early", capsys=capsys)
    assert status == 2
    assert "no descriptor 'early'; expected one of descriptor" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": np.zeros(2)}, "exits has shape .* expected names"),
        ({"exits": np.array(["b"])}, "lacks query_exit_b, and its exits are b"),
        ({"query_exit_a": np.zeros((2, 3))}, "query_exit_a has 2 rows; expected 5"),
        ({"gallery_exit_a": np.zeros(5)}, "gallery_exit_a has shape"),
        ({"multiply_adds": np.ones(1, int)}, "multiply_adds has .* expected 2 whole numbers"),
        ({"multiply_adds": np.ones(2)}, "multiply_adds has .* type float64"),
    ],
)
def test_files_with_damaged_exits(tmp_path, capsys, change, message):
    ids = np.arange(1, 6)
    arrays: dict[str, Any] = {
        f"{split}_{name}": ids for split in ("query", "gallery") for name in ("pids", "camids")
    }
    arrays |= {f"{split}_features": np.ones((5, 4)) for split in ("query", "gallery")}
    arrays |= {f"{split}_exit_a": np.ones((5, 2)) for split in ("query", "gallery")}
    arrays |= {"exits": np.array(["a"]), "multiply_adds": np.array([1, 2]), **change}
    np.savez(tmp_path / "f.npz", **arrays)
    status, _, err = call("--features", str(tmp_path / "f.npz"), capsys=capsys)
    assert status == 2
    assert re.search(message, err)


def test_descriptors_of_other_weights_are_computed_again(run, capsys):
    argv = ("--run", str(run.path))
    call(*argv, capsys=capsys)
    run.model.calls.clear()
    run.model.checkpoint_id = "last-20-def"
    _, _, err = call(*argv, capsys=capsys)
    assert len(run.model.calls) == 2
    assert "they are of checkpoint last-20-abc, not last-20-def" in err
    call(*argv, capsys=capsys)
    assert len(run.model.calls) == 2


@pytest.mark.parametrize("what", ["pixels", "labels", "names", "fewer"])
def test_data_are_known_by_content(run, capsys, dataset, what):
    """Other pixels under the same names have scores of their own, and spoil nobody else's."""
    argv = ("--run", str(run.path), "--json")
    first = json.loads(call(*argv, capsys=capsys)[1])
    gallery = dataset.gallery
    others = {
        "pixels": dataclasses.replace(gallery, images=encode_all(np.arange(40) % 3)),
        "labels": dataclasses.replace(gallery, camids=gallery.camids[::-1].copy()),
        "names": dataclasses.replace(gallery, names=np.char.add("x", gallery.names)),
        "fewer": gallery.select(np.arange(30)),
    }
    run.dataset = dataclasses.replace(dataset, gallery=others[what])
    run.model.calls.clear()
    second = json.loads(call(*argv, capsys=capsys)[1])
    assert len(run.model.calls) == 2
    if what == "pixels":
        assert second["results"][0]["mAP"] != first["results"][0]["mAP"]
    names = sorted(path.name for path in run.path.glob("*.npz"))
    assert len(names) == 2
    assert "features.npz" in names
    run.dataset = dataset
    assert json.loads(call(*argv, capsys=capsys)[1])["results"] == first["results"]
    assert len(run.model.calls) == 2


def test_the_best_checkpoint_keeps_its_own_descriptors(run, capsys):
    call("--run", str(run.path), capsys=capsys)
    before = (run.path / "features.npz").read_bytes()
    run.model.checkpoint_id = "best-10-abc"
    call("--run", str(run.path), "--checkpoint=best", capsys=capsys)
    assert (run.path / "features.npz").read_bytes() == before
    assert (run.path / "features-best.npz").exists()


@pytest.mark.parametrize("k", [1, 7])
def test_a_rank_beyond_what_was_computed_is_absent(tmp_path, capsys, k):
    out = tmp_path / "results.json"
    argv = ("--features", str(GOLDEN), f"--max_rank={k}", "--out", str(out))
    line = call(*argv, capsys=capsys)[1].splitlines()[-1].split()
    assert line[3:].count("-") == sum(rank > k for rank in (1, 5, 10))
    assert console.run(compare.main, [str(out), "--format=csv"]) == 0
    printed = capsys.readouterr().out
    ours = [row for row in csv.DictReader(io.StringIO(printed)) if row["source"] == str(out)]
    assert ours
    for row in ours:
        assert [bool(row[f"rank{rank}"]) for rank in (1, 5, 10)] == [r <= k for r in (1, 5, 10)]


def test_results_are_not_lost_where_they_cannot_be_kept(run, capsys, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "no", "somewhere")

    monkeypatch.setattr(descriptors, "save_features", refuse)
    status, out, err = call("--run", str(run.path), capsys=capsys)
    assert status == 0
    assert "mAP" in out
    assert "Descriptors are not kept: somewhere: Permission denied" in err
    monkeypatch.setattr(evaluate, "write_json", refuse)
    status, out, err = call(
        "--run", str(run.path), "--out", str(run.path / "x.json"), capsys=capsys
    )
    assert status == 2
    assert "mAP" in out
    assert err.splitlines()[-1] == "error: somewhere: Permission denied"


def test_outputs_are_checked_before_the_work(run, capsys):
    for name, message in (
        ("nodir/x.json", "is no directory; make it first"),
        ("", "is a directory"),
        ("run.json/x.json", "is no directory"),
    ):
        argv = ("--run", str(run.path), "--out", f"{run.path}/{name}")
        status, _, err = call(*argv, capsys=capsys)
        assert status == 2
        assert message in err
    assert run.model.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"ecm": {"k": 5}}', "no re-ranking 'ecm'; expected some of"),
        ('{"k": 5}', "no re-ranking 'k'"),
        ('{"ecn": {"foo": 1}}', "ecn has no parameter 'foo'; expected some of k (25), t (3)"),
        ('{"ecn": 5}', "ecn has parameters 5; expected"),
        ("[1]", "parameters of re-ranking are [1]; expected"),
        ("5", "parameters of re-ranking are 5; expected"),
    ],
)
def test_options_of_reranking_are_checked(run, capsys, options, message):
    status, _, err = call(
        "--run", str(run.path), "--rerank=ecn", f"--rerank_options={options}", capsys=capsys
    )
    assert status == 2
    assert message in err
    status, _, err = call("--run", str(run.path), "--rerank=magic", capsys=capsys)
    assert "no re-ranking 'magic'" in err
    assert run.model.calls == []


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}\n', "\x00\n"])
def test_a_damaged_run_is_named(run, capsys, name, text):
    if (name, text) in (("metrics.jsonl", ""), ("metrics.jsonl", "{")):
        pytest.skip("a log that was never written to, or whose last line was cut short")
    if name == "metrics.jsonl":
        text += "\n"
    (run.path / name).write_text(text)
    status, _, err = call("--run", str(run.path), capsys=capsys)
    assert status == 2
    assert name in err.splitlines()[-1]


def test_a_run_of_another_version_is_refused(run, capsys):
    write_json(run.path / "run.json", {"format": 99, "commit": "abc"})
    status, _, err = call("--run", str(run.path), capsys=capsys)
    assert status == 2
    assert "is a run of format 99, this version reads 1" in err


def test_flip_test_keeps_its_own_descriptors(run, capsys):
    argv = ("--run", str(run.path))
    call(*argv, capsys=capsys)
    status, out, _ = call(*argv, "--flip_test", capsys=capsys)
    assert status == 0
    assert "flip test True" in out
    assert run.model.calls[-1] == (40, 128, True)
    names = {path.name for path in run.path.glob("*.npz")}
    assert names == {"features.npz", "features-flip.npz"}


def test_a_run_is_tested_as_its_config_says(run, capsys):
    """Crops, metric and AP too, unless the command line says otherwise."""
    eval_config = {"crops": "ten", "metric": "euclidean", "normalize": False, "ap": "trapezoid"}
    write_json(run.path / "config.json", CONFIG | {"eval": CONFIG["eval"] | eval_config})
    for words, expected in (
        ((), eval_config),
        (
            ("--crops=none", "--metric=cosine", "--no-unnormalized", "--ap=standard"),
            {"crops": "none", "metric": "cosine", "normalize": True, "ap": "standard"},
        ),
    ):
        _, out, _ = call("--run", str(run.path), "--json", *words, capsys=capsys)
        protocol = json.loads(out)["results"][0]["protocol"]
        assert {name: protocol[name] for name in expected} == expected
    names = {path.name for path in run.path.glob("*.npz")}
    assert names == {"features.npz", "features-tencrops.npz"}
    ten, whole = (descriptors.load_features(run.path / name) for name in sorted(names))
    np.testing.assert_array_equal(ten["query_features"], whole["query_features"] + 1)
    # The flip test alone: ten crops have mirror images already.
    _, out, _ = call("--run", str(run.path), "--json", "--flip_test", capsys=capsys)
    protocol = json.loads(out)["results"][0]["protocol"]
    assert (protocol["flip_test"], protocol["crops"]) == (True, "none")


def test_torn_descriptors_of_a_run_are_computed_again(run, capsys):
    (run.path / "features.npz").write_bytes(b"PK\x03\x04torn")
    status, out, _ = call("--run", str(run.path), capsys=capsys)
    assert status == 0
    assert "mAP" in out
    assert len(run.model.calls) == 2
    descriptors.load_features(run.path / "features.npz")


def test_a_torn_features_file_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "features.npz").write_bytes(b"PK\x03\x04torn")
    status, _, err = call("--features", str(tmp_path / "features.npz"), capsys=capsys)
    assert status == 2
    assert "features.npz is not a complete .npz file" in err


def test_no_run_is_a_clear_error(tmp_path, capsys):
    status, _, err = call("--run", str(tmp_path), capsys=capsys)
    assert status == 2
    assert "is not a run" in err


def test_features_file_gives_the_golden_numbers(capsys, tmp_path):
    out_file = tmp_path / "results.json"
    status, out, _ = call(
        "--features", str(GOLDEN), "--rerank=ecn,k_reciprocal,aqe", "--out", str(out_file),
        capsys=capsys,
    )  # fmt: skip
    assert status == 0
    with np.load(GOLDEN) as golden:
        expected = {
            "plain": golden["ap_standard"].mean(),
            "ecn": golden["mAP_after_ecn_rankdist_k25_t3_q8"],
            "k_reciprocal": golden["mAP_after_kreciprocal_k20_6_l0.3"],
        }
    results = {e["name"]: e for e in json.loads(out_file.read_text())["results"]}
    assert list(results) == ["plain", "ecn", "k_reciprocal", "aqe"]
    for name, mAP in expected.items():
        assert results[name]["mAP"] == pytest.approx(float(mAP), abs=1e-6)
        assert f"{100 * float(mAP):.2f}" in out
    assert "60 junk left out" in out


def test_two_files_equal_one(tmp_path, capsys):
    with np.load(GOLDEN) as golden:
        for split in ("query", "gallery"):
            np.savez(
                tmp_path / f"{split}.npz",
                **{name: golden[f"{split}_{name}"] for name in ("features", "pids", "camids")},
            )
    pair = [f"--{split}_features={tmp_path / split}.npz" for split in ("query", "gallery")]
    two = call(*pair, "--json", "--ap=trapezoid", capsys=capsys)[1]
    one = call("--features", str(GOLDEN), "--json", "--ap=trapezoid", capsys=capsys)[1]
    assert json.loads(two)["results"] == json.loads(one)["results"]
    assert json.loads(two)["results"][0]["protocol"]["ap"] == "trapezoid"


def test_options_reach_the_protocol(capsys):
    out = call(
        "--features", str(GOLDEN), "--json", "--metric=euclidean", "--unnormalized", "--keep_junk",
        "--rerank=k_reciprocal", "--max_rank=7", "--no_distractors", capsys=capsys,
    )[1]  # fmt: skip
    plain, reranked = json.loads(out)["results"]
    protocol = plain["protocol"]
    assert protocol["metric"] == "euclidean"
    assert protocol["normalize"] is False
    assert protocol["distractor_pid"] is None
    assert protocol["num_distractors"] == 0
    assert len(plain["cmc"]) == 7
    assert reranked["protocol"]["junk"] == "neighbours in re-ranking"


def test_further_scores(capsys):
    argv = ("--features", str(GOLDEN), "--verification", "--bootstrap=200")
    text = call(*argv, capsys=capsys)[1]
    assert "95 % by identity: mAP" in text
    assert "TPR at FPR 0.001" in text
    assert "DIR at FAR 0.1" in text
    results = json.loads(call(*argv, "--json", "--bootstrap_by=query", capsys=capsys)[1])
    low, high = results["results"][0]["intervals"]["mAP"]
    assert low < results["results"][0]["mAP"] < high
    assert 0 < results["verification"]["eer"] < 0.5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.ones((2, 2))}, "lacks query_features, gallery_features.*holds features"),
        ({"query_pids": np.array(["a"] * 49)}, r"query_pids\[0\] is"),
        ({"query_pids": np.array(["a"] * 49, object)}, "holds Python objects"),
        ({"query_features": np.full((49, 48), np.nan, np.float32)}, "query_features holds NaN"),
    ],
)
def test_bad_files(arrays, message, tmp_path, capsys):
    if "features" not in arrays:
        with np.load(GOLDEN) as golden:
            arrays = dict(golden) | arrays
    np.savez(tmp_path / "bad.npz", **arrays)
    status, _, err = call("--features", str(tmp_path / "bad.npz"), capsys=capsys)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert re.search(message, err)


def test_one_array_is_no_features_file(tmp_path, capsys):
    np.save(tmp_path / "one.npy", np.ones(3))
    status, _, err = call("--features", str(tmp_path / "one.npy"), capsys=capsys)
    assert status == 2
    assert "is one array; expected an .npz file" in err


def test_learned_reranking_of_a_run(run, tmp_path, capsys):
    """Heads come from the checkpoint and stay with the descriptors; elsewhere there are none."""
    rng = np.random.default_rng(0)
    run.model.heads = {
        "pair_kernel": rng.standard_normal((4, 24, 2)).astype(np.float32),
        "pair_bias": np.zeros((4, 2), np.float32),
    }
    words = ("--rerank=gsrw", "--json", '--rerank_options={"gsrw": {"top": 20}}')
    status, out, _ = call("--run", str(run.path), *words, capsys=capsys)
    assert status == 0
    plain, walked = json.loads(out)["results"]
    assert walked["rerank"] == "gsrw"
    assert walked["protocol"]["rerank_options"] == {"top": 20, "alpha": 0.95}
    assert (walked["protocol"]["metric"], walked["protocol"]["normalize"]) == ("euclidean", False)
    assert walked["mAP"] != plain["mAP"]
    status, again, _ = call("--features", str(run.path / "features.npz"), *words, capsys=capsys)
    assert status == 0
    assert json.loads(again)["results"][1]["mAP"] == walked["mAP"]
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--run", str(run.path), "--rerank=gsrw"), "top is 75, but there are only 40 gallery"),
        (("--features", str(GOLDEN), "--rerank=gsrw"), "came without (pair_kernel, pair_bias)"),
        (("--features", str(GOLDEN), "--rerank=gsrw", "--neighbors=faiss"), "needs --rerank=ecn"),
    ]
    for wrong, message in cases:
        status, _, err = call(*wrong, capsys=capsys)
        assert status == 2
        assert message in err


def test_reranking_a_tiny_gallery_names_the_numbers(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "tiny.npz",
        query_features=rng.random((2, 4)), gallery_features=rng.random((10, 4)),
        query_pids=[1, 2], gallery_pids=[1, 2] * 5, query_camids=[1, 1], gallery_camids=[2] * 10,
    )  # fmt: skip
    path = str(tmp_path / "tiny.npz")
    status, _, err = call("--features", path, "--rerank=ecn", capsys=capsys)
    assert status == 2
    assert "k is 25, but there are only 12 images in queries and gallery" in err
    assert call("--features", path, capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one of --run"),
        (["--features", "a", "--run", "b"], "give one of --run"),
        (["--query_features", "a"], "go together"),
        (["--features", "a", "--flip_test"], "--flip_test needs --run"),
        (["--features", "a", "--crops=ten"], "--crops needs --run"),
        (["--features", "a", "--rerank_options=k=3"], "is not JSON"),
        (["--features", "a", "--rerank=ecn", '--rerank_options={"ecm": {}}'], "'ecm'"),
        (["--features", "a", '--rerank_options={"ecn": {"k": 5}}'], "add it to --rerank"),
        (["--features", "a", "--rerank=ecn", "--rerank_options=[1]"], "expected them by method"),
        (["--features", "a", "--rerank=aqe", "--neighbors=faiss"], "needs --rerank=ecn"),
    ],
)
def test_bad_flags(argv, message, capsys):
    status, _, err = call(*argv, capsys=capsys)
    assert status == 2
    assert message in err


def test_missing_file(capsys):
    status, _, err = call("--features", "/nowhere/x.npz", capsys=capsys)
    assert status == 2
    assert "/nowhere/x.npz does not exist" in err


def test_features_are_written_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "features.npz"
    descriptors.save_features(path, {"a": np.arange(3)})
    with pytest.raises(ValueError, match="a is an array of Python objects"):
        descriptors.save_features(path, {"a": np.array([object()])})
    assert descriptors.load_arrays(path, ("a",))["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]


def test_a_rank_that_was_not_computed_is_absent(capsys):
    text = call("--features", str(GOLDEN), "--max_rank=5", capsys=capsys)[1]
    assert text.splitlines()[-1].split()[0] == "plain"
    assert text.splitlines()[-1].split()[-1] == "-"
    assert text.splitlines()[-1].split()[-2] != "-"


def test_reranking_is_checked_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr(results, "evaluate", None)
    options = '--rerank_options={"ecn": {"k": 5000}}'
    status, _, err = call("--features", str(GOLDEN), "--rerank=ecn", options, capsys=capsys)
    assert status == 2
    assert "k is 5000" in err


def test_people_numbered_from_zero_are_pointed_out(tmp_path, capsys):
    features = np.eye(3, dtype=np.float32)
    pids, path = np.arange(3), tmp_path / "zero.npz"
    np.savez(
        path,
        query_features=features,
        gallery_features=features,
        query_pids=pids,
        gallery_pids=pids,
        query_camids=np.ones(3, int),
        gallery_camids=np.full(3, 2),
    )
    _, out, err = call("--features", str(path), capsys=capsys)
    assert "3 queries (2 with a match)" in out
    assert "1 of 3 queries have pid 0, which means distractor" in err
    _, out, err = call("--features", str(path), "--no_distractors", capsys=capsys)
    assert "3 queries (3 with a match)" in out
    assert "distractor" not in err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_files_that_were_skipped_count_when_they_are_repaired(tmp_path, capsys):
    root = tmp_path / "data"
    synthetic.main(["--out", str(root), "--preset", "small"])
    capsys.readouterr()
    broken = sorted((root / "query").iterdir())[:4]
    whole = {path: path.read_bytes() for path in broken}
    for path in broken:
        path.write_bytes(b"")
    given = {"name": "market1501", "root": str(root), "on_bad_image": "skip"}
    fields = {f"dataset.{name}": value for name, value in given.items()}
    path = make_run(tmp_path / "run", tmp_path / "cache", **fields)
    argv = ("--run", str(path), "--json")
    assert json.loads(call(*argv, capsys=capsys)[1])["dataset"]["num_query"] == 20
    for path, content in whole.items():
        path.write_bytes(content)
    again = json.loads(call(*argv, capsys=capsys)[1])
    assert again["dataset"]["num_query"] == len(again["results"][0]["ap"]) == 24

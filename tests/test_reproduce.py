"""Published numbers: how each is measured again, what is said of it, and the command."""

import csv
import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from mros_jax import config as configs
from mros_jax import console, evaluate, import_weights, reproduce, train
from mros_jax.campaign import costs, evaluations, imported, jobs, readiness, summary, systems
from mros_jax.campaign.evaluations import Protocol
from mros_jax.campaign.verdicts import Verdict, format_csv, list_cells
from mros_jax.errors import UserError
from mros_jax.files import read_json, write_json
from mros_jax.runs import paper as papers
from tests.least import write_config
from tests.runs import begin_run
from tests.test_campaign import make_line

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAPER = papers.load_tables()
PROGRAMS = {
    "mros_jax.train": train.main,
    "mros_jax.evaluate": evaluate.main,
    "mros_jax.import_weights": import_weights.main,
}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A data set of noise in Market-1501's layout: 12 people to train, 8 to test, 3 cameras."""
    root = tmp_path_factory.mktemp("market")
    rng = np.random.default_rng(0)
    people = {"bounding_box_train": (range(1, 13), 2), "query": (range(20, 28), 1)}
    people |= {"bounding_box_test": (range(20, 28), 2)}
    for folder, (pids, images) in people.items():
        (root / folder).mkdir()
        for pid in pids:
            for camera in (1, 2, 3):
                for i in range(images):
                    pixels = rng.integers(0, 255, (32, 16, 3), np.uint8)
                    name = f"{pid:04d}_c{camera}s1_{i:06d}_{images:02d}.jpg"
                    Image.fromarray(pixels).save(root / folder / name)
    return root


@pytest.fixture
def command(tmp_path, market, cache_dir, monkeypatch):
    """The words of a reproduction by the least network under Strong ReID's name, in this process.

    The list that is with them has what was started.
    """
    words = write_config(tmp_path, cache_dir, monkeypatch)
    file = tmp_path / "mean.py"
    file.write_text(file.read_text().replace('config.name = "mean"', 'config.name = "strong"'))
    started = []

    def run_here(words, file):
        started.append(words)
        try:
            return PROGRAMS[words[0]](words[1:])
        except UserError as error:
            with file.open("a") as log:
                log.write(f"error: {error}\n")
            return console.MISUSE

    monkeypatch.setattr(jobs, "run_process", run_here)
    monkeypatch.setattr(costs, "measure_apart", lambda words, n: costs.measure(words, n, 0.0))
    words = [f"--configs={tmp_path / 'mean.py'}", *words[1:], f"--root={market}"]
    words += ["--config.num_epochs=1", "--config.eval.rerank=()", f"--out={tmp_path / 'out'}"]
    return [*words, "--repeats=1", "--seeds=0,1"], started


def test_a_reproduction_from_end_to_end(command, tmp_path, capsys):
    words, started = command
    assert console.run(reproduce.main, words) == 0
    printed = capsys.readouterr().out
    assert "2 of 2" in printed
    assert "as measured on a few real steps of each system" in printed
    assert [w[0] for w in started] == 2 * ["mros_jax.train"] + 4 * ["mros_jax.evaluate"]

    out = tmp_path / "out"
    report = read_json(out / "reproduce.json")
    plain, reranked = report["verdicts"]
    assert (plain["table"], plain["published"]) == (2, {"mAP": 85.9, "rank1": 94.5})
    assert (reranked["table"], reranked["protocol"]) == (5, "k_reciprocal")
    for verdict in (plain, reranked):
        assert verdict["seeds"] == ["0", "1"]
        assert verdict["text"].startswith("not comparable: another recipe (")
        assert "num_query: 24, not 3368" in verdict["text"]
        assert "network.trunk: None, not resnet50" in verdict["text"]
        ours = verdict["scores"]["mAP"]
        mean = sum(ours["values"]) / 2
        assert verdict["differences"]["mAP"] == pytest.approx(mean - verdict["published"]["mAP"])
    runs = [read_json(out / f"runs/strong-seed{seed}/results.json") for seed in (0, 1)]
    expected = [100 * run["results"][0]["mAP"] for run in runs]
    assert plain["scores"]["mAP"]["values"] == pytest.approx(expected)
    assert set(report["common"]) == {"plain", "ecn"}
    assert report["common"]["plain"]["strong"]["mAP"]["values"] == pytest.approx(expected)

    lines = list(csv.DictReader((out / "reproduce.csv").open()))
    assert {line["metric"] for line in lines} == {"mAP", "rank1"}
    assert {line["verdict"] for line in lines} == {"not comparable"}
    page = (out / "reproduce.html").read_text()
    assert "num_query: 24, not 3368" in page
    assert "prefers-color-scheme: dark" in page
    assert "| Strong ReID |" in (out / "reproduce.md").read_text()
    assert (out / "reproduce.txt").read_text() in printed

    started.clear()
    assert console.run(reproduce.main, words) == 0
    assert started == []
    assert "0 of 2" in capsys.readouterr().out


def test_an_evaluation_that_fails_is_said(command, tmp_path, monkeypatch, capsys):
    words, _ = command

    def fail(words):
        raise UserError("no room")

    monkeypatch.setitem(PROGRAMS, "mros_jax.evaluate", fail)
    assert console.run(reproduce.main, words) == 1
    assert "2 of 2 complete" in capsys.readouterr().out
    plain, reranked = read_json(tmp_path / "out" / "reproduce.json")["verdicts"]
    assert plain["scores"]  # of the training itself
    assert reranked["text"] == "not comparable: no run could be evaluated so"


def test_an_estimate_trains_nothing(command, tmp_path, capsys):
    words, started = command
    assert console.run(reproduce.main, [*words, "--dry-run"]) == 0
    assert started == []
    assert " in all, and " in capsys.readouterr().out
    assert not (tmp_path / "out" / "runs").exists()


def test_everything_that_is_wrong_is_said_at_once(tmp_path, monkeypatch, capsys, market):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    (tmp_path / "out" / "runs" / "strong-seed0").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "strong-seed0" / "a.txt").write_text("")
    words = ["--systems=strong,dare-densenet201,hacnn", f"--out={tmp_path / 'out'}", "--seeds=0"]
    absent = tmp_path / "absent.pth"
    command = [*words, "--root=nowhere", "--weights", f"strong-baseline={absent}"]
    assert console.run(reproduce.main, command) == console.MISUSE
    message = capsys.readouterr().err
    for part in (
        "5 things are to be mended first",
        "nowhere (no such directory)",
        "weights: none for densenet201 (for dare-densenet201); "
        "python -m mros_jax.fetch_weights densenet201",
        "weights: none for resnet50 (for strong); python -m mros_jax.fetch_weights resnet50_v1",
        "strong-seed0: ",
        "is not empty and not a run (it holds a.txt)",
        f"weights: {absent} does not exist",
    ):
        assert part in message
    command = [*words, f"--root={market}", f"--config.weights={broken}"]
    assert console.run(reproduce.main, command) == console.MISUSE
    assert f"weights: {broken}" in capsys.readouterr().err


def test_names_that_are_none(market, capsys):
    command = [f"--root={market}", "--systems=strnog"]
    assert console.run(reproduce.main, command) == console.MISUSE
    assert "did you mean strong?" in capsys.readouterr().err
    for word in ("strong-baseline", "somebody=a.pth"):
        assert (
            console.run(reproduce.main, [f"--root={market}", "--weights", word]) == console.MISUSE
        )
        assert f"--weights {word}: expected PEER=FILE" in capsys.readouterr().err


def test_nothing_is_trained_for_nothing(market, capsys):
    assert console.run(reproduce.main, [f"--root={market}", "--no_training"]) == console.MISUSE
    assert "--no_training needs --weights" in capsys.readouterr().err


def test_what_fails_in_a_few_steps_is_not_trained(command, capsys):
    words, started = command
    command = [*words, "--config.eval.rerank=('ecn',)", "--config.eval.rerank_options.ecn.k=500"]
    assert console.run(reproduce.main, command) == console.MISUSE
    assert "some steps of each system were tried, and failed for" in capsys.readouterr().err
    assert started == []


def list_rows():
    return [(table, row) for table in PAPER["table"] for row in table["row"]]


def test_the_protocol_of_every_row():
    """Each is a command line that evaluate understands, and fits what such an evaluation says."""
    for table, row in list_rows():
        protocol = Protocol.of(PAPER, table, row)
        args = evaluate._parse(["--run=x", *protocol.words])
        found = {
            "ap": args.ap,
            "flip_test": args.flip_test,
            "crops": args.crops,
            "normalize": not args.unnormalized,
            "metric": args.metric or "cosine",
            "rerank": table.get("rerank"),
            "rerank_options": {**table.get("rerank_options", {}), "neighbors": "exact"},
        }
        assert protocol.fits({"rerank": table.get("rerank"), "protocol": found})
        changes = {"ap": "none", "flip_test": not args.flip_test, "crops": "five"}
        changes |= {"normalize": args.unnormalized}
        if protocol.metric is not None:
            changes["metric"] = "other"
        for name, value in changes.items():
            other = {"rerank": table.get("rerank"), "protocol": found | {name: value}}
            assert not protocol.fits(other)
        assert not protocol.fits({"rerank": "aqe", "protocol": found | {"rerank": "aqe"}})
        wanted = {**PAPER["protocol"], **row.get("protocol", {})}
        assert all(getattr(protocol, name) == wanted[name] for name in ("ap", "crops", "flip_test"))


def test_own_protocols_of_systems():
    protocols = evaluations.list_protocols("trinet", PAPER)
    own, reranked, plain, ecn = protocols
    assert (own.ap, own.crops, own.normalize, own.metric) == (
        "trapezoid",
        "ten",
        False,
        "euclidean",
    )
    assert reranked == dataclasses.replace(own, rerank="k_reciprocal", options=reranked.options)
    assert reranked.plain == own
    assert (plain.metric, plain.crops, plain.rerank, ecn.rerank) == ("cosine", "none", None, "ecn")
    assert json.loads(ecn.options) == {"k": 25, "t": 3, "q": 8, "method": "rankdist"}


def make_verdict(**changes):
    scores = {
        "mAP": summary.Score((80.0, 82.0), 78.0, 84.0),
        "rank1": summary.Score((90.0, 91.0), 89.0, 92.0),
    }
    verdict = Verdict(
        system="a",
        table=4,
        name="A",
        protocol="plain",
        published={"mAP": 83.0, "rank1": 91.5},
        scores=scores,
        seeds=("0", "1"),
        reasons=(),
        note="a note",
    )
    return dataclasses.replace(verdict, **changes)


@pytest.mark.parametrize(
    ("published", "text"),
    [
        ({"mAP": 83.0, "rank1": 91.5}, "reproduced"),
        ({"mAP": 84.0, "rank1": 89.0}, "reproduced"),
        ({"mAP": 84.1, "rank1": 92.1}, "below"),
        ({"mAP": 77.9}, "above"),
        ({"mAP": 90.0, "rank1": 91.5}, "below: mAP; reproduced: Rank-1"),
    ],
)
def test_verdicts(published, text):
    verdict = make_verdict(published=published)
    assert verdict.text == text
    assert verdict.difference("mAP") == pytest.approx(81.0 - published["mAP"])
    [first, *_] = csv.DictReader(io.StringIO(format_csv([verdict])))
    assert first["verdict"] in text
    assert list_cells([verdict])[0][-1] in text


def test_a_verdict_needs_what_can_be_compared():
    verdict = make_verdict(reasons=("ap: trapezoid, not standard",))
    assert verdict.text == "not comparable: ap: trapezoid, not standard"
    assert verdict.judge("mAP") is None
    assert verdict.difference("mAP") == pytest.approx(-2)
    assert make_verdict(published={"rank10": 99.0}).judge("rank10") is None


def test_another_recipe_is_said():
    [system] = systems.choose(systems.find_systems(), ["strong"])
    harmless = ["--config.dataset.root=/data", "--config.report=False"]
    harmless += ["--config.eval.every_epochs=5", "--config.eval.rerank_options.ecn.k=20"]
    harmless.append("--config.weights=/data/resnet50.pth")
    random = systems.prepare([system], overrides=["--config.weights=none"])[0].list_changes()
    assert random == ("another recipe (weights=none)",)
    assert systems.prepare([system], overrides=harmless)[0].list_changes() == ()
    changed = systems.prepare([system], epochs=3, overrides=harmless)[0].list_changes()
    assert len(changed) == 1
    assert "num_epochs=3" in changed[0]
    assert system.list_changes() == ()


def test_time_in_words():
    times = {45: "45 s", 119: "119 s", 240: "4.0 min", 7200: "2.0 h", 200_000: "2.3 days"}
    assert {seconds: readiness.format_time(seconds) for seconds in times} == times


def test_what_is_foretold(tmp_path):
    """Evaluations that training does not do itself, with their passes; runs that are left."""
    found = systems.choose(systems.find_systems(), ["trinet", "pcb"])
    planned = jobs.make_jobs(found, [0, 1], tmp_path)
    cost = make_line("a", 50, 10).cost
    assert cost is not None
    measured = {
        "trinet": dataclasses.replace(cost, passes=10),  # 1000 images x 0.01 s
        "pcb": cost,
    }
    text = readiness.format_estimate(found, planned, measured, PAPER)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    # Its own descriptors, of ten crops, are there; those of whole images take a tenth, and serve
    # for both rankings of the common protocol.
    assert f" {2 + (2 + 1)} s " in rows["trinet"]
    assert f" {2 + 2} s " in rows["pcb"]
    total = 2 * (cost.run_seconds + 5) + 2 * (cost.run_seconds + 4)
    assert f"{readiness.format_time(total)} in all, and 2.00 GB of memory" in text


def test_a_checkpoint_of_other_code_stands_beside_them(tmp_path, cache_dir, market, monkeypatch):
    """It is evaluated as its system was published, from a run without results."""
    file = tmp_path / "bot.pth"
    file.write_bytes(b"tensors")
    [one] = imported.read_weights([f"strong-baseline={file}"], tmp_path / "out")
    words = write_config(tmp_path, cache_dir, monkeypatch)
    data = ["--config.dataset.name=market1501", f"--config.dataset.root={market}"]
    config, _ = configs.parse_config([*words, "--config.name=strong-authors", *data])
    assert config is not None
    begin_run(one.run.path, config)
    record = read_json(one.run.record_file)
    digest = hashlib.sha256(b"tensors").hexdigest()
    write_json(one.run.record_file, {**record, "imported": {"sha256": digest}})
    started = []

    def run_here(words, log):
        started.append(words[0])
        try:
            return PROGRAMS[words[0]](words[1:])
        except UserError as error:
            log.write_text(f"error: {error}\n")
            return console.MISUSE

    monkeypatch.setattr(jobs, "run_process", run_here)
    command = [f"--root={market}", f"--out={tmp_path / 'out'}", "--no_training"]
    command += ["--weights", f"strong-baseline={file}"]
    command += ["--config.batch.identities=4", "--config.batch.images=2"]
    assert console.run(reproduce.main, command) == 0
    assert set(started) == {"mros_jax.evaluate"}
    report = read_json(tmp_path / "out" / "reproduce.json")
    label = "strong-authors of strong-baseline (bot.pth)"
    assert {verdict["system"] for verdict in report["verdicts"]} == {label}
    assert [verdict["seeds"] for verdict in report["verdicts"]] == [["-"], ["-"]]
    assert set(report["common"]["ecn"]) == {label}

    with jobs.open_folder(tmp_path / "out") as ledger:
        file.write_bytes(b"others")
        [problem] = imported.import_all([one], [], ledger)
        assert "was made of another bot.pth" in problem
        [other] = imported.read_weights([f"mgn={file}"], tmp_path / "out")
        [problem] = imported.import_all([other], [], ledger)
        assert str(file) in problem
        assert started[-1] == "mros_jax.import_weights"
    with pytest.raises(UserError, match="there is another of the name mgn-bot"):
        imported.read_weights([f"mgn={file}", f"mgn={tmp_path / 'b' / 'bot.pth'}"], tmp_path)

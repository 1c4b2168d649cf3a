"""The search for Auto-ReID's cells: halves, its steps, going on, the comparison, bad input."""

import json

import jax
import numpy as np
import pytest

from configs import auto_reid
from mros_jax import console, parallel
from mros_jax import train as training
from mros_jax.models.cells import draw_cell, format_cell, parse_cell, read_genotype
from mros_jax.models.operations import OPERATIONS
from mros_jax.runs.results import FORMAT
from mros_jax.runs.run import Run
from mros_jax.training import loop
from scripts import search_auto_reid
from tests.training import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")

CELL = "dil(0) skip(1), dil(2) skip(0), dil(3) skip(2), dil(4) skip(1)"
TINY = {
    "dataset.preset": "small",
    "input.height": 48,
    "input.width": 16,
    "batch.identities": 4,
    "batch.images": 2,
    "network.cells": (1, 1),
    "network.width": 3,
    "network.normal": CELL,
    "network.reduce": CELL,
    "log_every_steps": 1,
}


@pytest.fixture
def words(cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fields = {**TINY, "dataset.cache_dir": cache_dir}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/auto_reid.py:small", *overrides]


@pytest.fixture
def few_operations(monkeypatch):
    """What is searched among: compiling all seven takes minutes."""
    for kind in ("max", "avg", "sep", "part"):
        monkeypatch.delitem(OPERATIONS, kind)


def test_halves_share_nobody():
    pids = np.random.default_rng(1).integers(0, 13, 200)
    first, second = search_auto_reid.halve(pids, 0)
    assert not set(pids[first]) & set(pids[second])
    np.testing.assert_array_equal(np.sort([*first, *second]), np.arange(200))
    assert [len(set(pids[rows])) for rows in (first, second)] == [7, 6]
    assert not np.array_equal(search_auto_reid.halve(pids, 1)[0], first)


@pytest.mark.slow
def test_a_turn_moves_what_is_its_own(cache_dir, few_operations):
    """The first half's weights, the other's those of the operations; each the classifier."""
    config = auto_reid.get_config("small")
    with config.unlocked():
        config.update_from_flattened_dict({**TINY, "dataset.cache_dir": str(cache_dir)})
        config.batch_norm = "synchronised"
    own = search_auto_reid.make_config(config, epochs=1, balance=0.5, lr=0.1, alpha_lr=0.5)
    halves = search_auto_reid.Halves(own)
    start, step = search_auto_reid.make_search(own, halves.dataset.num_classes, 5)
    take_turn = parallel.MappedStep(step)
    state = parallel.replicate(start)
    turns = ({"trunk", "neck", "classifier"}, {"alphas", "classifier"})
    for moved, batch in zip(turns, next(halves.batches(0)), strict=True):
        before = jax.device_get(state.params["network"])
        state, metrics = take_turn(state, halves.data, batch)
        after = jax.device_get(state.params["network"])
        changes = jax.tree.map(np.subtract, after, before)
        found = {name for name, tree in changes.items() if any(map(np.any, jax.tree.leaves(tree)))}
        assert found == moved
        total = 0.5 * (metrics["loss/cross_entropy"] + metrics["loss/triplet"])
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on_exactly(
    words, tmp_path, monkeypatch, capsys, few_operations
):
    """A stopped search ends as one that was not; with another setting it is refused."""

    def search(out, *options):
        argv = [*words, "--epochs=2", f"--out={out}", "--alpha_lr=0.5", *options]
        return console.run(search_auto_reid.main, argv)

    assert search(tmp_path / "whole") == 0
    polls = 0

    def poll(self, at_log_point):
        nonlocal polls
        polls += 1
        self.agreed = polls == 3
        return self.agreed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stop, "poll", poll)
        assert search(tmp_path / "parts") == 0
    assert "Stopped after step 3" in capsys.readouterr().err
    assert search(tmp_path / "parts") == 0
    whole, parts = (Run(tmp_path / name / "search") for name in ("whole", "parts"))
    assert whole.metrics_file.read_bytes() == parts.metrics_file.read_bytes()
    assert whole.config["search"] == {"balance": 0.5, "lr": 0.1, "alpha_lr": 0.5}
    found = read_genotype(tmp_path / "whole" / "genotype.toml")
    assert found == read_genotype(tmp_path / "parts" / "genotype.toml")
    assert all("none" not in text and parse_cell(text) for text in found.values())

    assert search(tmp_path / "whole", "--balance=0.4") == console.MISUSE
    assert "search.balance: 0.5 -> 0.4" in capsys.readouterr().err


def test_comparison_is_of_equal_trainings(words, tmp_path, monkeypatch, capsys):
    trained = []
    found = {name: draw_cell(np.random.default_rng(9)) for name in ("normal", "reduce")}

    def train(config, workdir):
        trained.append((config, workdir))
        score = 0.1 * len(trained)
        return {"results": [{"mAP": score, "cmc": [2 * score]}]}

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(search_auto_reid, "search", lambda *_: found)
    argv = [*words, f"--out={tmp_path}", "--compare=2"]
    assert console.run(search_auto_reid.main, argv) == 0
    table = (tmp_path / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert "| found | 10.0 | 20.0 |" in table
    assert "| random 2 | 30.0 | 60.0 |" in table
    assert "| mean of random | 25.0 | 50.0 |" in table
    (ours, _), *others = trained
    assert ours.network.normal == format_cell(found["normal"])
    assert len({(c.network.normal, c.network.reduce) for c, _ in trained}) == 3
    for config, _ in others:
        with config.unlocked():
            config.network.update({name: ours.network[name] for name in ("normal", "reduce")})
            config.name = ours.name
        assert config == ours


def test_comparison_takes_no_results_of_another_recipe(words, tmp_path, monkeypatch, capsys):
    found = {name: draw_cell(np.random.default_rng(9)) for name in ("normal", "reduce")}

    prints = dict.fromkeys(("train", "query", "gallery"), "")
    record = {"dataset": {"name": "", "num_classes": 1, "fingerprints": prints}}

    def train(config, workdir):
        with Run(workdir).claim(config, record):
            entry = {"name": "plain", "protocol": {}, "mAP": 0.5, "cmc": [0.5]}
            results = {"format": FORMAT, "run": {}, "dataset": {}, "results": [entry]}
            (workdir / "results.json").write_text(json.dumps(results))
        return Run(workdir).results

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(search_auto_reid, "search", lambda *_: found)
    argv = [*words, f"--out={tmp_path}", "--compare=1"]
    assert console.run(search_auto_reid.main, argv) == 0
    table = (tmp_path / "compare.md").read_text()
    monkeypatch.setattr(training, "train", None)  # finished trainings are not repeated
    assert console.run(search_auto_reid.main, argv) == 0
    assert (tmp_path / "compare.md").read_text() == table
    assert console.run(search_auto_reid.main, [*argv, "--config.num_epochs=7"]) == console.MISUSE
    assert "belongs to a run of another config" in capsys.readouterr().err


def test_a_comparison_with_fewer_than_none(words, tmp_path, capsys):
    """It is refused before the search."""
    with pytest.raises(SystemExit):
        search_auto_reid.main([*words, f"--out={tmp_path / 'out'}", "--compare=-1"])
    assert "-1 is below 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--balance=1.5"], "--balance is 1.5; it must be from 0 to 1"),
        (["--alpha_lr=0"], "--alpha_lr is 0.0; it must be above 0"),
        (["--lr=nan"], "--lr is nan; it must be above 0"),
    ],
)
def test_bad_input(words, tmp_path, options, message, capsys):
    argv = [*words, f"--out={tmp_path / 'out'}", *options]
    assert console.run(search_auto_reid.main, argv) == console.MISUSE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", ["identities", "identities_once"])
def test_halves_too_small_for_a_batch(words, tmp_path, sampler, capsys):
    fields = [f"--config.batch.sampler={sampler}", "--config.batch.identities=8"]
    argv = [*words, *fields, f"--out={tmp_path / 'out'}"]
    assert console.run(search_auto_reid.main, argv) == console.MISUSE
    assert "6 identities and a batch needs 8" in capsys.readouterr().err


def test_a_config_of_another_system(tmp_path, capsys):
    argv = [f"--config={ROOT / 'configs' / 'demo.py'}", f"--out={tmp_path / 'out'}"]
    assert console.run(search_auto_reid.main, argv) == console.MISUSE
    assert "give configs/auto_reid.py" in capsys.readouterr().err

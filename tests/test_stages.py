"""Training in stages, and the start from another run: exact, compiled once, and what is refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mros_jax import config as configs
from mros_jax import console, train
from mros_jax.errors import NotFoundError, UserError
from mros_jax.report import build
from mros_jax.runs import checkpoints
from mros_jax.runs.run import Run
from mros_jax.training import recipe
from mros_jax.training.loop import Stop
from mros_jax.training.source import Source, load_source
from mros_jax.training.step import make_train_step
from tests.training import (
    TINY,
    assert_equal,
    assert_same_run,
    finish,
    read_logged_steps,
    read_training_state,
    start_words,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS = [
    "--config=configs/pcb_rpp.py:synthetic",
    "--config.network.trunk=tiny",
    "--config.weights=none",
    "--config.input.height=96",
    "--config.batch.size=8",
    *(f"--config.stages.stage{i}.epochs=1" for i in (1, 2, 3)),
    *(f"--config.{name}={value}" for name, value in TINY.items() if not name.startswith("batch")),
    "--config.eval.every_epochs=1",
]


@pytest.fixture(scope="module")
def words(cache_dir):
    return [*WORDS, f"--config.dataset.cache_dir={cache_dir}"]


def run(words, workdir, *more):
    config, rest = configs.parse_config([*words, *more])
    assert not rest
    return train.train(config, workdir)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, words):
    """A run of three stages, and how often the step of each was traced for compilation."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    traced: list[int] = []
    make = make_train_step

    def count(*args, **options):
        step, number = make(*args, **options), len(traced)
        traced.append(0)

        def counted(*args):
            traced[number] += 1
            return step(*args)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "make_train_step", count)
        run(words, workdir)
    return workdir, traced


@pytest.fixture(scope="module")
def per_epoch(uninterrupted):
    return len(read_logged_steps(uninterrupted[0])) // 3


@pytest.mark.slow
def test_a_stage_is_compiled_once(uninterrupted):
    assert uninterrupted[1] == [1, 1, 1]


def stop_after(monkeypatch, steps):
    """Stop the next run after so many steps, as a signal does."""
    left = [steps]

    def poll(self, at_log_point):
        left[0] -= 1
        self.agreed = left[0] == 0
        return self.agreed

    monkeypatch.setattr(Stop, "poll", poll)


@pytest.mark.slow
def test_resuming_around_an_edge(tmp_path, words, uninterrupted, per_epoch, monkeypatch):
    """One step before, at the edge, and one step after it; each start takes what is left."""
    workdir, edge = tmp_path / "run", 2 * per_epoch
    for steps, at in ((edge - 1, edge - 1), (1, edge), (1, edge + 1)):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert run(words, workdir) is None
        state = read_training_state(workdir)
        assert int(state["step"]) == at
        momenta = momenta_of(state)
        if at == edge - 1:  # only the part classifier has one
            assert list(momenta) == ["part_classifier/kernel"]
            assert all(map(np.any, momenta.values()))
        elif at == edge:  # the state is the next stage's
            names = {name.partition("/")[0] for name in momenta}
            assert names == {"part_classifier", "trunk", "classifier", "embedding"}
            assert not any(map(np.any, momenta.values()))
            trunk = state["params"]["network"]["trunk"]
    # Evaluated at both edges: the best model is that of one of them, with the trunk of stage 1.
    model, step = checkpoints.load_variables(workdir / "checkpoints", "best")
    assert step in (per_epoch, edge)
    assert_equal(model["params"]["trunk"], trunk)
    with pytest.raises(AssertionError):
        assert_equal(state["params"]["network"]["trunk"], trunk)
    assert run(words, workdir) is not None
    assert_same_run(workdir, uninterrupted[0])


def momenta_of(state):
    """Parameter -> momentum, of a state as it lies on disk."""
    leaves = jax.tree_util.tree_leaves_with_path(state["opt_state"])
    named = (
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    )
    return {name.partition("/trace/network/")[2]: leaf for name, leaf in named if "/trace/" in name}


@pytest.mark.slow
def test_kill_after_an_edge(tmp_path, words, uninterrupted, per_epoch):
    """kill -9 as soon as the next stage has taken a step: it begins again at the edge."""
    workdir = tmp_path / "run"
    process = start_words(workdir, *words, "--config.log_every_steps=1", devices=4)
    wait_until(lambda: len(read_logged_steps(workdir)) > per_epoch, process)
    process.kill()
    process.communicate()
    output = finish(start_words(workdir, *words, devices=4))
    # At the second where the kill came late.
    assert any(f"Going on after step {i * per_epoch} of" in output for i in (1, 2))
    assert "Stage stage3, from epoch 2 to 3" in output
    assert_same_run(workdir, uninterrupted[0])


@pytest.mark.slow
def test_the_log_has_the_same_keys_in_all_stages(uninterrupted, per_epoch):
    records = Run(uninterrupted[0]).train_records
    assert {tuple(record) for record in records} == {tuple(records[0])}
    rates = {
        name: [records[epoch * per_epoch + 1][f"lr/{name}"] for epoch in range(3)]
        for name in ("trunk", "heads", "part_classifier")
    }
    assert rates == {
        "trunk": pytest.approx([0.01, 0, 0.001]),
        "heads": pytest.approx([0.1, 0, 0.01]),
        "part_classifier": pytest.approx([0, 0.01, 0.01]),
    }


@pytest.mark.slow
def test_the_report_draws_no_rate_where_a_group_is_frozen(uninterrupted):
    [chart] = [
        c for c in build._plot_training(Run(uninterrupted[0])) if c["title"] == "Learning rate"
    ]
    curves = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: var\(--c\d', chart["svg"])
    pieces = sorted(len(re.findall("M ", curve)) for curve in curves)
    assert pieces == [1, 2, 2]


@pytest.mark.parametrize(
    ("words_of_it", "message"),
    [
        (["--config.num_epochs=4"], "config.num_epochs is 4, and the epochs of its stages stage1"),
        (
            ["--config.stages.stage2.epochs=-1"],
            "config.stages.stage2.epochs is -1; it must be 1 or",
        ),
        (["--config.num_steps=10"], "config.num_steps is 10; stages are counted in epochs"),
        (["--config.accumulate_steps=90"], "config.stages.stage1: config.accumulate_steps is 90"),
        (
            ["--config.init.run=runs/nowhere"],
            "config.init.run: runs/nowhere is not a run: there is",
        ),
        (["--config.init.checkpoint=first"], "config.init.checkpoint is 'first'; expected one of"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(tmp_path, words, words_of_it, message, capsys):
    arguments = [*words, *words_of_it, f"--workdir={tmp_path / 'run'}"]
    assert console.run(train.main, arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"error: {message}")
    assert not any("Traceback" in line for line in told)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_stage_begins_anew(words):
    """Accumulated gradients are the optimizer's and go; the moving average stays."""
    more = ["--config.accumulate_steps=2", "--config.ema_decay=0.5", "--config.clip_norm=1.0"]
    config, _ = configs.parse_config([*words, *more])
    parts = recipe.build(config, num_classes=4, steps_per_epoch=3)
    first, second, _ = parts.stages
    opt_state = first.optimizer.init(parts.state.params)
    ones = jax.tree.map(np.ones_like, parts.state.params)
    _, opt_state = jax.jit(first.optimizer.update)(ones, opt_state, parts.state.params)
    assert int(opt_state.mini_step) == 1
    begun = second.begin(dataclasses.replace(parts.state, opt_state=opt_state, step=jnp.int32(3)))
    assert not any(map(np.any, jax.tree.leaves(begun.opt_state)))
    assert begun.ema_params is parts.state.ema_params
    # The rates of the second stage are asked for its own steps: its first update is in step 2.
    update = jax.jit(second.optimizer.update)
    for _ in range(2):
        updates, opt_state = update(ones, begun.opt_state, begun.params)
        begun = dataclasses.replace(begun, opt_state=opt_state)
    moved = {
        path[0] for path, x in traverse_util.flatten_dict(updates["network"]).items() if np.any(x)
    }
    assert moved == {"part_classifier"}


@pytest.mark.slow
def test_part_pooling_from_a_trained_run(tmp_path, words, uninterrupted, caplog):
    """The second stage alone, with another part classifier: all else has every bit of the run."""
    copy = shutil.copytree(uninterrupted[0], tmp_path / "pcb")
    caplog.set_level("INFO")
    more = [
        "--config.num_epochs=1",
        "--config.stages.stage1.epochs=0",
        "--config.stages.stage3.epochs=0",
        "--config.network.part_classifier=authors",
        "--config.init.checkpoint=best",
        f"--config.init.run={copy}",
    ]
    workdir = tmp_path / "run"
    results = run(words, workdir, *more)
    config, _ = configs.parse_config([*words, *more])
    assert config is not None
    source = load_source(config.init)
    assert source is not None
    model, _ = checkpoints.load_variables(workdir / "checkpoints")
    ours, theirs = (dict(x["params"]) for x in (model, source.variables))
    assert ours.pop("part_classifier").keys() == {"kernel", "bias"}
    assert theirs.pop("part_classifier").keys() == {"kernel"}
    assert_equal(ours, theirs)
    with pytest.raises(AssertionError):  # batch normalization goes on
        assert_equal(model["batch_stats"], source.variables["batch_stats"])
    record = json.loads((workdir / "run.json").read_text())
    assert record["init"] == {"run": str(copy), "checkpoint_id": source.checkpoint_id}
    assert source.checkpoint_id.startswith("best-")
    assert f"start from {copy}, checkpoint best-" in caplog.text
    assert "misshapen params/part_classifier/kernel" in caplog.text
    assert "missing params/part_classifier/bias (6,)" in caplog.text

    shutil.rmtree(copy)  # a run that has begun needs it no more
    assert run(words, workdir, *more) == results
    assert json.loads((workdir / "run.json").read_text())["init"] == record["init"]


def test_another_number_of_identities(caplog):
    caplog.set_level("INFO")
    there = {"params": {"trunk": np.ones((2, 3)), "classifier": np.ones((3, 5)), "old": np.ones(1)}}
    here = {"params": {"trunk": np.zeros((2, 3)), "classifier": np.zeros((3, 4))}}
    filled = Source("runs/pcb", "last-1-a", there).fill(here)["params"]
    assert filled["trunk"] is there["params"]["trunk"]
    assert filled["classifier"] is here["params"]["classifier"]
    assert set(filled) == {"trunk", "classifier"}
    assert "1 of 2 arrays of the network start from runs/pcb" in caplog.text
    assert "misshapen params/classifier (3, 5), expected (3, 4)" in caplog.text


def test_a_run_with_nothing_in_common():
    there = {"params": {"trunk": np.ones((2, 3))}}
    with pytest.raises(UserError, match=r"nothing in the network of runs/x .*trunk \(2, 3\)"):
        Source("runs/x", "last-1-a", there).fill({"params": {"trunk": np.zeros((2, 4))}})


@pytest.mark.slow
def test_a_run_that_has_saved_nothing(tmp_path, words, uninterrupted):
    copy = shutil.copytree(uninterrupted[0], tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    config, _ = configs.parse_config([*words, f"--config.init.run={copy}"])
    assert config is not None
    with pytest.raises(NotFoundError, match=r"config\.init\.run: no complete checkpoint below"):
        load_source(config.init)


@pytest.mark.slow
def test_a_start_that_is_another_now(tmp_path, words, uninterrupted):
    """A run that was killed before its first checkpoint begins anew, from the same weights only."""
    config, _ = configs.parse_config(words)
    record = json.loads((uninterrupted[0] / "run.json").read_text())
    workdir = Run(tmp_path / "run")
    record["init"] = {"run": "runs/pcb", "checkpoint_id": "last-1-abc"}
    for _ in range(2):
        with workdir.claim(config, record):
            pass
    record["init"] = {"run": "runs/pcb", "checkpoint_id": "last-2-def"}
    message = "from the checkpoint last-1-abc of runs/pcb; config.init is last-2-def of runs/pcb"
    with pytest.raises(UserError, match=message), workdir.claim(config, record):
        pass

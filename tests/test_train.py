"""The training command: real processes, real kills, and what it refuses."""

import json
import signal
import socket
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from ml_collections import config_flags

from mros_jax import parallel, train
from mros_jax.files import read_jsonl
from mros_jax.inference import load_model
from mros_jax.runs.logs import Writer
from mros_jax.training import checkpoints
from mros_jax.training.loop import Stop
from tests.training import TINY, assert_close, assert_equal, finish, make_config, start


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def _training_state(workdir):
    """All arrays of the last checkpoint: parameters, statistics, optimiser, centres, step."""
    manager = ocp.CheckpointManager(
        workdir / "checkpoints" / "last", options=ocp.CheckpointManagerOptions(read_only=True)
    )
    step = manager.latest_step()
    args = ocp.args.Composite(training=ocp.args.StandardRestore())
    return manager.restore(step, args=args).training


def _results(workdir):
    return json.loads((workdir / "results.json").read_text())["results"]


def _logged_steps(workdir):
    return [r["step"] for r in read_jsonl(workdir / "metrics.jsonl") if r["kind"] == "train"]


def _wait_until(condition, process, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_dir):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    output = finish(start(workdir, cache_dir))
    return workdir, output


def test_run_leaves_all_its_files(uninterrupted):
    workdir, _ = uninterrupted
    steps = _logged_steps(workdir)
    assert steps == list(range(1, steps[-1] + 1))
    records = read_jsonl(workdir / "metrics.jsonl")
    assert {"loss", "triplet", "center", "cross_entropy", "lr", "grad_norm"} <= records[0].keys()
    evaluated = [r["epoch"] for r in records if r["kind"] == "eval"]
    assert evaluated == [1, 2]  # every second epoch and the last, counted from 0
    results = json.loads((workdir / "results.json").read_text())
    assert [r["name"] for r in results["results"]] == ["plain", "ecn"]
    assert results["results"][0]["mAP"] == records[-1]["mAP"]
    assert results["run"]["step"] == steps[-1]
    run = json.loads((workdir / "run.json").read_text())
    assert run["command"].split()[1:3] == ["-m", "mros_jax.train"]
    assert run["versions"]["jax"] == jax.__version__
    assert json.loads((workdir / "config.json").read_text())["batch"]["identities"] == 4
    assert list((workdir / "tensorboard").glob("events*"))
    with np.load(workdir / "features.npz") as features:
        assert len(features["query_features"]) == len(features["query_names"])
        # So that `mros_jax.evaluate` takes them as this checkpoint's and computes nothing again.
        assert features["checkpoint_id"] == load_model(workdir).checkpoint_id
    _, step = checkpoints.load_variables(workdir / "checkpoints", "best")
    best = max((r for r in records if r["kind"] == "eval"), key=lambda r: r["mAP"])
    assert step == best["step"]


def test_interrupted_run_resumes_exactly(tmp_path, cache_dir, uninterrupted):
    """kill -9 in the middle of an epoch, kill -9 in the middle of a save, then SIGTERM."""
    workdir, reference = tmp_path / "run", uninterrupted[0]
    last = workdir / "checkpoints" / "last"
    steps_per_epoch = _logged_steps(reference)[-1] // TINY["num_epochs"]

    process = start(workdir, cache_dir)
    _wait_until(lambda: len(_logged_steps(workdir)) > steps_per_epoch, process)
    process.kill()
    process.communicate()
    assert len(_logged_steps(workdir)) % steps_per_epoch != 0

    process = start(workdir, cache_dir)
    second = str(2 * steps_per_epoch)

    def saving():
        return any(p.name.startswith(second) and "tmp" in p.name for p in last.iterdir())

    _wait_until(saving, process)
    process.kill()
    process.communicate()
    assert not (last / second).exists(), "the kill came too late to hit the save"

    process = start(workdir, cache_dir)
    _wait_until(lambda: len(_logged_steps(workdir)) == steps_per_epoch, process)  # taken back
    _wait_until(lambda: len(_logged_steps(workdir)) > steps_per_epoch, process)
    process.terminate()
    output = finish(process)
    assert f"Going on after step {steps_per_epoch} " in output
    assert "Stopped after step" in output
    assert not (workdir / "results.json").exists()

    finish(start(workdir, cache_dir))
    assert_equal(_training_state(workdir), _training_state(reference))
    for name in ("metrics.jsonl", "config.json"):
        assert (workdir / name).read_bytes() == (reference / name).read_bytes(), name
    starts = json.loads((workdir / "run.json").read_text())["earlier_starts"]
    assert len(starts) == 3
    for here, there in zip(_results(workdir), _results(reference), strict=True):
        for name in ("mAP", "mINP", "cmc", "ap", "first_match_rank"):
            assert here[name] == there[name]


def test_interrupt_is_taken_note_of_once():
    with Stop() as stop:
        assert not stop.poll(at_log_point=False)
        signal.raise_signal(signal.SIGINT)
        assert stop.poll(at_log_point=False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_finished_run_is_not_trained_again(uninterrupted, cache_dir):
    workdir, _ = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    results = train.train(make_config(cache_dir), workdir)
    assert results == json.loads((workdir / "results.json").read_text())
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_two_processes_equal_one(tmp_path, cache_dir):
    """Two processes of one device each, talking over loopback, train as two devices do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {"num_epochs": 1, "model.batch_norm": "synchronised"}
    pair = [
        start(
            tmp_path / "pair",
            cache_dir,
            f"--coordinator_address={address}",
            "--num_processes=2",
            f"--process_id={i}",
            **common,
        )
        for i in range(2)
    ]
    for process in pair:
        finish(process)
    finish(start(tmp_path / "single", cache_dir, devices=2, **common))
    runs = [tmp_path / name for name in ("pair", "single")]
    assert json.loads((runs[0] / "run.json").read_text())["processes"] == 2
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in runs)
    for here, there in zip(ours, theirs, strict=True):
        assert here.pop("kind") == there.pop("kind")
        assert here == pytest.approx(there, rel=1e-4)
    assert_close(_training_state(runs[0]), _training_state(runs[1]), 1e-4)


def test_loop_runs_under_a_transfer_guard(tmp_path, cache_dir, monkeypatch):
    guards = []
    call = parallel.MappedStep.__call__

    def spy(self, *args):
        guards.append(jax.config.jax_transfer_guard_device_to_host)
        return call(self, *args)

    monkeypatch.setattr(parallel.MappedStep, "__call__", spy)
    options = {"num_epochs": 1, "model.dtype": "bfloat16", "optimizer.ema_decay": 0.9}
    options |= {"optimizer.accumulate_steps": 2, "optimizer.clip_norm": 1.0}
    config = make_config(cache_dir, **options, **{"optimizer.name": "adamw"})
    train.train(config, tmp_path / "run")
    assert set(guards) == {"disallow"}
    variables, _ = checkpoints.load_variables(tmp_path / "run" / "checkpoints")
    state = _training_state(tmp_path / "run")
    assert_equal(variables["params"], state["ema_params"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state["params"]))
    with pytest.raises(AssertionError):
        assert_close(state["params"], state["ema_params"], 1e-6)


def test_other_configs_workdir_is_refused(uninterrupted, cache_dir):
    workdir, _ = uninterrupted
    config = make_config(cache_dir, **{"optimizer.lr": 0.5})
    with pytest.raises(ValueError, match=r"another config(.|\n)*optimizer.lr: 0.006 -> 0.5"):
        train.train(config, workdir)


def test_strangers_directory_is_refused(tmp_path, cache_dir):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and not a run"):
        train.train(make_config(cache_dir), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_diverged_loss_names_step_parts_and_checkpoint(tmp_path, cache_dir):
    config = make_config(
        cache_dir, **{"optimizer.lr": 1e25, "optimizer.warmup_epochs": 0, "log_every_steps": 100}
    )
    with pytest.raises(FloatingPointError, match=r"at step \d+ .*triplet.*none was saved yet"):
        train.train(config, tmp_path / "run")
    assert checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").last_step() is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.dtype", "float16", "config.model.dtype is 'float16'; expected one of"),
        ("num_epochs", 0, "config.num_epochs is 0; it must be at least 1"),
        ("eval.rerank", ("magic",), "config.eval.rerank names 'magic'"),
        ("batch.identities", 3, "a batch of 3 identities x 2 images = 6 cannot be split over 4"),
        ("batch.identities", 100, "12 training identities"),
        ("dataset.preset", "huge", "unknown preset 'huge'"),
        ("eval.rerank_options.ecn.k", 5000, "5000"),
        ("input.height", 100, "height 100"),
    ],
)
def test_impossible_configs_are_refused_early(tmp_path, cache_dir, name, value, message):
    with pytest.raises(ValueError, match=message):
        train.train(make_config(cache_dir, **{name: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments):
        # ml_collections finds overrides of the config in sys.argv.
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        values(sys.argv)
        return values.config

    return parse


def test_config_arguments_and_overrides(parse):
    config = parse("--config=configs/mros.py:duke,III", "--config.optimizer.lr=3e-4")
    assert (config.dataset.name, config.model.setting) == ("dukemtmc", "III")
    assert config.optimizer.lr == 3e-4
    config = parse("--config=configs/mros.py", "--config.dataset.root=somewhere")
    assert (config.dataset.name, config.model.setting) == ("market1501", "IV")
    assert config.dataset.root == "somewhere"
    assert config.batch.identities * config.batch.images == 128
    assert parse("--config=configs/mros.py:synthetic").dataset.name == "synthetic"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--config=configs/mros.py", "--config.optimizer.rate=1"], AttributeError),
        (["--config=configs/mros.py", "--config.optimizer.lr=fast"], flags.IllegalFlagValueError),
        (["--config=configs/mros.py:V"], flags.IllegalFlagValueError),
    ],
)
def test_unknown_names_and_wrong_types_are_errors(parse, arguments, error):
    with pytest.raises(error):
        _ = parse(*arguments)


def test_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    writer = Writer(tmp_path)
    for step in (1, 2, 3):
        writer.metrics("train", {"step": step, "epoch": 0, "loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # killed while writing
    Writer(tmp_path, start_step=2).close()
    assert _logged_steps(tmp_path) == [1, 2]


def test_command_line_says_what_is_wrong_without_a_traceback(tmp_path, cache_dir):
    process = start(tmp_path / "run", cache_dir, **{"dataset.name": "market1501"})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "configs/mros.py:synthetic" in output
    assert "Traceback" not in output

"""The training command: real processes, real kills, and what it refuses."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mros_jax import config as configs
from mros_jax import console, parallel, train
from mros_jax.errors import DivergedError, NotFoundError, UserError
from mros_jax.files import read_jsonl
from mros_jax.inference import load_model
from mros_jax.runs import checkpoints, lock
from mros_jax.runs import run as run_module
from mros_jax.runs.logs import Writer
from mros_jax.runs.run import Run
from mros_jax.training import validation
from mros_jax.training.loop import Stop
from mros_jax.training.state import TrainState
from tests.least import write_config
from tests.training import (
    JAX_CONFIG,
    ROOT,
    TINY,
    assert_close,
    assert_equal,
    assert_same_run,
    finish,
    make_config,
    read_logged_steps,
    read_results,
    read_training_state,
    start,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_dir):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    output = finish(start(workdir, cache_dir))
    return workdir, output


def test_run_leaves_all_its_files(uninterrupted):
    workdir, _ = uninterrupted
    steps = read_logged_steps(workdir)
    assert steps == list(range(1, steps[-1] + 1))
    records = read_jsonl(workdir / "metrics.jsonl")
    assert {"loss", "loss/triplet", "loss/center", "lr/network", "grad_norm"} <= records[0].keys()
    evaluated = [r["epoch"] for r in records if r["kind"] == "eval"]
    assert evaluated == [2, 3]  # completed epochs: every second and the last
    per_epoch = steps[-1] // 3
    assert [r["epoch"] for r in records if r["kind"] == "train"] == [s // per_epoch for s in steps]
    results = json.loads((workdir / "results.json").read_text())
    assert [r["name"] for r in results["results"]] == ["plain", "ecn"]
    assert results["results"][0]["mAP"] == records[-1]["mAP"]
    assert (results["run"]["step"], results["run"]["epoch"]) == (steps[-1], 3)
    run = json.loads((workdir / "run.json").read_text())
    assert run["command"].split()[1:3] == ["-m", "mros_jax.train"]
    assert run["versions"]["jax"] == jax.__version__
    assert json.loads((workdir / "config.json").read_text())["batch"]["identities"] == 4
    assert list((workdir / "tensorboard").glob("events*"))
    with np.load(workdir / "features.npz") as features:
        assert len(features["query_features"]) == len(features["query_names"])
        # So that `mros_jax.evaluate` takes them as this checkpoint's and computes nothing again.
        assert features["checkpoint_id"] == load_model(workdir).checkpoint_id
    best = workdir / "checkpoints" / "best"
    assert not list(best.glob("*/training"))  # only what is evaluated
    _, step = checkpoints.load_variables(workdir / "checkpoints", "best")
    best = max((r for r in records if r["kind"] == "eval"), key=lambda r: r["mAP"])
    assert step == best["step"]


@pytest.mark.slow
def test_random_kills(tmp_path, cache_dir, uninterrupted):
    """kill -9 at random moments, a few by default; MROS_KILLS=50 takes longer."""
    kills = int(os.environ.get("MROS_KILLS", "2"))
    workdir, reference = tmp_path / "run", uninterrupted[0]
    moments = np.random.default_rng(int(os.environ.get("MROS_KILLS_SEED", "0")))
    done = 0
    while done < kills:
        process = start(workdir, cache_dir)
        wait_until(lambda: (workdir / "config.json").exists(), process)
        try:
            # Half of a run's length after its start, so that runs end, too, and begin again.
            process.wait(moments.uniform(0, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        process.communicate()
        if process.returncode == 0:
            assert_same_run(workdir, reference)
            shutil.rmtree(workdir)
    finish(start(workdir, cache_dir))
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_interrupted_run_resumes_exactly(tmp_path, cache_dir, uninterrupted):
    """kill -9 in the middle of an epoch, kill -9 in the middle of a save, then SIGTERM."""
    workdir, reference = tmp_path / "run", uninterrupted[0]
    last = workdir / "checkpoints" / "last"
    steps_per_epoch = read_logged_steps(reference)[-1] // TINY["num_epochs"]

    process = start(workdir, cache_dir)
    wait_until(lambda: len(read_logged_steps(workdir)) > steps_per_epoch, process)
    process.kill()
    process.communicate()
    assert len(read_logged_steps(workdir)) % steps_per_epoch != 0

    process = start(workdir, cache_dir)
    second = str(2 * steps_per_epoch)

    def saving():
        return any(p.name.startswith(second) and "tmp" in p.name for p in last.iterdir())

    wait_until(saving, process)
    process.kill()
    process.communicate()
    assert not (last / second).exists(), "the kill came too late to hit the save"

    process = start(workdir, cache_dir)
    wait_until(lambda: len(read_logged_steps(workdir)) == steps_per_epoch, process)  # taken back
    wait_until(lambda: len(read_logged_steps(workdir)) > steps_per_epoch, process)
    process.terminate()
    output = finish(process)
    assert f"Going on after step {steps_per_epoch} " in output
    assert "Stopped after step" in output
    assert not (workdir / "results.json").exists()

    finish(start(workdir, cache_dir))
    assert_same_run(workdir, reference)
    starts = json.loads((workdir / "run.json").read_text())["earlier_starts"]
    assert len(starts) == 3


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN])
def test_interrupt_is_taken_note_of_once(inherited):
    """Also where it was ignored, as of what a shell's script starts in the background."""
    former = signal.signal(signal.SIGINT, inherited)
    try:
        with Stop() as stop:
            assert not stop.poll(at_log_point=False)
            signal.raise_signal(signal.SIGINT)
            assert stop.poll(at_log_point=False)
            if inherited is not signal.SIG_IGN:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is inherited
    finally:
        signal.signal(signal.SIGINT, former)


def test_finished_run_is_not_trained_again(uninterrupted, cache_dir):
    workdir, _ = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    results = train.train(make_config(cache_dir), workdir)
    assert results == json.loads((workdir / "results.json").read_text())
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, cache_dir):
    """Two processes of one device each, talking over loopback, train as two devices do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {"num_epochs": 1, "batch_norm": "synchronised"}
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
    assert_close(read_training_state(runs[0]), read_training_state(runs[1]), 1e-4)


@pytest.mark.slow
def test_resumed_on_other_numbers_of_devices(tmp_path, cache_dir):
    """From four devices to one to two: the run of one device, but for rounding."""
    # A low rate, as training amplifies rounding.
    values = {"batch_norm": "synchronised", "optimizer.network.lr": 1e-5, "log_every_steps": 1}
    finish(start(tmp_path / "one", cache_dir, devices=1, **values))
    reference = read_logged_steps(tmp_path / "one")
    workdir, before = tmp_path / "several", 0
    for devices in (4, 1):
        process = start(workdir, cache_dir, devices=devices, **values)
        wait_until(lambda n=before + 2: len(read_logged_steps(workdir)) >= n, process)
        process.terminate()
        assert "Stopped after step" in finish(process)
        before = len(read_logged_steps(workdir))
    assert 2 < before < len(reference)
    finish(start(workdir, cache_dir, devices=2, **values))
    ours, theirs = (read_jsonl(tmp_path / x / "metrics.jsonl") for x in ("several", "one"))
    a, b = ([r["loss"] for r in x if r["kind"] == "train"] for x in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert [r["epoch"] for r in Run(workdir).eval_records] == [2, 3]
    a, b = (read_training_state(tmp_path / x)["params"] for x in ("several", "one"))
    assert_close(a, b, 1e-4)


@pytest.mark.slow
def test_loop_runs_under_a_transfer_guard(tmp_path, cache_dir, monkeypatch):
    guards = []
    call = parallel.MappedStep.__call__

    def spy(self, *args):
        guards.append(JAX_CONFIG.jax_transfer_guard_device_to_host)
        return call(self, *args)

    monkeypatch.setattr(parallel.MappedStep, "__call__", spy)
    options = {"num_epochs": 1, "dtype": "bfloat16", "ema_decay": 0.9}
    options |= {"accumulate_steps": 2, "clip_norm": 1.0, "optimizer.network.kind": "adamw"}
    config = make_config(cache_dir, **options)
    train.train(config, tmp_path / "run")
    assert set(guards) == {"disallow"}
    variables, _ = checkpoints.load_variables(tmp_path / "run" / "checkpoints")
    state = read_training_state(tmp_path / "run")
    assert_equal(variables["params"], state["ema_params"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state["params"]))
    with pytest.raises(AssertionError):
        assert_close(state["params"]["network"], state["ema_params"], 1e-6)


def test_other_configs_workdir_is_refused(uninterrupted, cache_dir):
    workdir, _ = uninterrupted
    config = make_config(cache_dir, **{"optimizer.network.lr": 0.5})
    with pytest.raises(ValueError, match=r"another config(.|\n)*network.lr: 0.006 -> 0.5"):
        train.train(config, workdir)


def test_strangers_directory_is_refused(tmp_path, cache_dir):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and not a run"):
        train.train(make_config(cache_dir), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def least(tmp_path, cache_dir, monkeypatch):
    """The words of a config whose step is compiled soon, for what happens around steps."""
    return write_config(tmp_path, cache_dir, monkeypatch)


def test_diverged_loss_names_step_parts_and_checkpoint(tmp_path, least):
    changes = ["--config.schedule.warmup_epochs=0", "--config.log_every_steps=100"]
    config, _ = configs.parse_config([*least, *changes])
    assert config is not None
    with config.unlocked():
        config.optimizer.all.lr = 1e38
        config.objective.triplet = {"loss": "triplet", "on": ("descriptor",)}
    with pytest.raises(DivergedError, match=r"at step \d+ .*triplet.*none was saved yet"):
        train.train(config, tmp_path / "run")
    assert checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").step() is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "float16", "config.dtype is 'float16'; expected one of"),
        ("num_epochs", 0, "config.num_epochs is 0; it must be at least 1"),
        ("num_steps", -1, "config.num_steps is -1; it must be 0"),
        ("augment.resize", (96, 31), r"config.augment.resize is \(96, 31\); .* at least 96 x 32"),
        ("eval.resize", (96,), r"config.eval.resize is \(96,\); expected height and width"),
        ("eval.resize", (100, 32), "height 100"),
        ("eval.crops", "five", "config.eval.crops is 'five'; expected one of none, ten"),
        ("eval.rerank", ("magic",), "magic"),
        ("batch.identities", 3, "a batch of 6 images cannot be split over 4"),
        ("batch.identities", 100, "12 training identities"),
        ("dataset.preset", "huge", "preset is 'huge'; expected one of market, demo, small"),
        ("eval.rerank_options.ecn.k", 5000, "5000"),
        ("input.height", 100, "height 100"),
        ("accumulate_steps", 1000, "accumulate_steps is 1000, and the run has only"),
        ("ema_decay", 1.5, "config.ema_decay is 1.5"),
        ("optimizer.network.lr", float("nan"), "config.optimizer.network.lr is nan"),
        ("augment.erase", 3.0, "erase is a probability"),
        ("augment.pad", -3, "pad must not be negative"),
        ("seed", -1, "config.seed is -1"),
        ("objective.triplet.margin", -5.0, "objective.triplet: margin is -5.0"),
        ("objective.triplet.on", ("g_t9",), "no output 'g_t9'"),
        ("objective.center.weight", -1.0, "objective.center: weight is -1.0"),
        ("optimizer.network.params", ("network/foo",), "no group of the optimizer matches"),
        ("schedule.decay_epochs", (5, 3), "must be increasing"),
        ("network.num_stripes", 0, "num_stripes is 0"),
        ("eval.rerank_options.ecn.method", "foo", "method is 'foo'"),
        ("eval.rerank_options.ecn.k", 0, "k is 0"),
        ("weights", "typo.pth", "typo.pth: no such file"),
    ],
)
def test_impossible_configs_are_refused_early(tmp_path, cache_dir, name, value, message):
    with pytest.raises(ValueError, match=message):
        train.train(make_config(cache_dir, **{name: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [(95, 32), (96, 31)])
def test_ten_crops_of_images_that_are_smaller(tmp_path, cache_dir, size):
    config = make_config(cache_dir, **{"eval.crops": "ten", "eval.resize": size})
    with pytest.raises(UserError, match=r"config.eval.resize is .* at least 96 x 32"):
        train.train(config, tmp_path / "run")
    config = make_config(cache_dir, **{"eval.crops": "ten", "eval.flip_test": True})
    with pytest.raises(UserError, match="flip_test is True; the ten crops have mirror images"):
        train.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_ends_within_an_epoch(tmp_path, cache_dir, uninterrupted):
    """Its steps are those of a longer run; it is evaluated by epochs and at its end."""
    longer, _ = uninterrupted
    per_epoch = read_logged_steps(longer)[-1] // TINY["num_epochs"]
    workdir, length = tmp_path / "run", 2 * per_epoch + 3
    # On four devices, where the longer run had one.
    config = make_config(cache_dir, num_steps=length, batch_norm="synchronised")
    results = train.train(config, workdir)
    assert results is not None
    assert (results["run"]["step"], results["run"]["epoch"]) == (length, 2)
    ours, theirs = (read_jsonl(w / "metrics.jsonl") for w in (workdir, longer))
    assert [(r["step"], r["epoch"]) for r in ours if r["kind"] == "eval"] == [
        (2 * per_epoch, 2), (length, 2),
    ]  # fmt: skip
    losses = [[r["loss"] for r in x if r["kind"] == "train"] for x in (ours, theirs)]
    assert len(losses[0]) == length
    np.testing.assert_allclose(losses[0][:5], losses[1][:5], rtol=1e-3)
    # Once more changes nothing: the run is at its end.
    assert train.train(config, workdir) == results


def test_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    run = Run(tmp_path)
    writer = Writer(run)
    for step in (1, 2, 3):
        writer.metrics("train", {"step": step, "epoch": 0, "loss": 1.0 / step})
    writer.metrics("eval", {"step": 2, "epoch": 1, "mAP": 0.5})
    writer.close()
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # killed while writing
    Writer(run, 2).close()
    assert read_logged_steps(tmp_path) == [1, 2]
    assert len(Run(tmp_path).eval_records) == 1
    Writer(run, 2, keep_evaluation=False).close()
    assert read_logged_steps(tmp_path) == [1, 2]
    assert Run(tmp_path).eval_records == []


def test_command_line_says_what_is_wrong_without_a_traceback(tmp_path, cache_dir):
    process = start(tmp_path / "run", cache_dir, **{"dataset.name": "market1501"})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the data set 'synthetic' is rendered and needs none" in output
    assert "Traceback" not in output


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """A copy of a finished run to do harm to."""
    return shutil.copytree(uninterrupted[0], tmp_path / "copy")


@pytest.fixture
def untrained(monkeypatch):
    """Training that would be wrong to start."""

    def refuse(*args):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(parallel.MappedStep, "__call__", refuse)


@pytest.mark.slow
def test_a_failing_evaluation_loses_nothing(tmp_path, cache_dir, uninterrupted, monkeypatch):
    """The state is saved before it is evaluated; the next start evaluates it and goes on."""
    reference = uninterrupted[0]
    with monkeypatch.context() as patch:

        def fail(*args, **options):
            raise RuntimeError("no memory")

        patch.setattr(validation, "evaluate_features", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            train.train(make_config(cache_dir), tmp_path / "run")
    saved = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.step() == 2 * read_logged_steps(reference)[-1] // 3
    saved.close()
    assert train.train(make_config(cache_dir), tmp_path / "run") is not None
    assert read_logged_steps(tmp_path / "run") == read_logged_steps(reference)
    assert [r["epoch"] for r in Run(tmp_path / "run").eval_records] == [2, 3]


def test_results_that_are_gone_come_again(copy, cache_dir, untrained, uninterrupted):
    log_of_run = (copy / "metrics.jsonl").read_bytes()
    (copy / "results.json").unlink()
    train.train(make_config(cache_dir), copy)
    assert (copy / "metrics.jsonl").read_bytes() == log_of_run
    for here, there in zip(read_results(copy), read_results(uninterrupted[0]), strict=True):
        assert here["mAP"] == pytest.approx(there["mAP"], abs=1e-3)  # on four devices


def test_what_changes_no_result_may_change(copy, cache_dir, untrained, caplog):
    changes = {
        "dataset.device_fraction": 0.1,
        "log_every_steps": 7,
        "eval.batch_size": 64,
        "dataset.cache_dir": str(cache_dir),
    }
    caplog.set_level("INFO")
    assert train.train(make_config(cache_dir, **changes), copy) is not None
    assert "which change no result: dataset.device_fraction: 0.5 -> 0.1" in caplog.text
    assert json.loads((copy / "config.json").read_text())["log_every_steps"] == 7


def test_other_data_are_refused(copy, cache_dir, untrained):
    record = json.loads((copy / "run.json").read_text())
    record["dataset"]["fingerprints"]["gallery"] = "0" * 32
    record["dataset"]["num_gallery"] -= 1
    (copy / "run.json").write_text(json.dumps(record))
    before = _listing(copy)
    with pytest.raises(UserError, match=r"started with other gallery images of synthetic: \d+"):
        train.train(make_config(cache_dir), copy)
    assert _listing(copy) == before


def test_another_arithmetic_is_refused(copy, cache_dir, untrained):
    record = json.loads((copy / "run.json").read_text())
    record["arithmetic"]["enable_x64"] = True
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="enable_x64: True -> False"):
        train.train(make_config(cache_dir), copy)


def _listing(path):
    return sorted((str(p), p.stat().st_mtime_ns) for p in path.rglob("*"))


def test_a_workdir_in_use_is_refused_at_once(copy, cache_dir, untrained):
    with lock.hold(copy / ".lock"):
        before = _listing(copy)
        since = time.monotonic()
        with pytest.raises(UserError, match=rf"in use by another process: {os.getpid()} on .*"):
            train.train(make_config(cache_dir), copy)
        assert time.monotonic() - since < 2
        assert _listing(copy) == before
    (copy / ".lock").write_text("left by one that was killed")
    train.train(make_config(cache_dir), copy)
    assert not (copy / ".lock").exists()


@pytest.mark.slow
def test_two_commands_at_once(tmp_path, cache_dir):
    first = start(tmp_path / "run", cache_dir)
    wait_until(lambda: (tmp_path / "run" / "config.json").exists(), first)
    second = start(tmp_path / "run", cache_dir)
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 2
    assert f"is in use by another process: {first.pid} on" in output
    assert "Traceback" not in output
    first.kill()
    first.communicate()


@pytest.mark.parametrize(
    "strays", [["lost+found"], ["train.log", "nohup.out"], [".config.json.1.tmp"]]
)
def test_what_systems_leave_does_not_matter(tmp_path, cache_dir, strays):
    for name in strays:
        (tmp_path / name).touch()
    Run(tmp_path).check_free(make_config(cache_dir))


@pytest.mark.parametrize("name", ["", "below", "below/more"])
def test_a_file_as_workdir(tmp_path, cache_dir, name):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="file is a file; give another --workdir"):
        train.train(make_config(cache_dir), tmp_path / "file" / name)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_workdir_that_cannot_be_written(tmp_path, cache_dir, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written; give another --workdir"):
        train.train(make_config(cache_dir), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_leaves_no_trace_and_the_right_one_goes_on(tmp_path, cache_dir):
    config = make_config(cache_dir, **{"weights": str(tmp_path / "typo.safetensors")})
    with pytest.raises(UserError, match=r"typo\.safetensors"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Run(tmp_path / "run").check_free(make_config(cache_dir))


@pytest.mark.parametrize(
    ("harm", "program"),
    [
        ("remove", "evaluate"),
        pytest.param("flip", "evaluate", marks=pytest.mark.slow),
        pytest.param("cut", "train", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_named(copy, cache_dir, harm, program):
    [model] = (copy / "checkpoints" / "last").glob("*/model/d/*")
    [training] = (copy / "checkpoints" / "last").glob("*/training/d/*")
    for path in (model, training):
        whole = path.read_bytes()
        path.unlink()
        if harm == "cut":
            path.write_bytes(whole[: len(whole) // 2])
        elif harm == "flip":
            path.write_bytes(bytes(255 - byte for byte in whole))
    arguments = {
        "evaluate": [f"--run={copy}"],
        "train": ["--config=configs/demo.py", f"--workdir={copy}", *_overrides(cache_dir)],
    }[program]
    done = subprocess.run(
        [sys.executable, "-m", f"mros_jax.{program}", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    told = done.stderr.splitlines()[-1]
    assert "is damaged" in told
    assert "--checkpoint best" in told
    assert "To start over, remove" in told
    assert "Traceback" not in done.stderr


def _overrides(cache_dir):
    values = {**TINY, "dataset.cache_dir": str(cache_dir)}
    return [f"--config.{name}={value}" for name, value in values.items()]


@pytest.mark.parametrize("where", ["claim", "logs", "save"])
def test_a_full_disk_ends_with_one_line(tmp_path, least, where, monkeypatch, capsys):
    """What was there stays, no temporary file stays, and the same command goes on."""
    full = OSError(errno.ENOSPC, "no", str(tmp_path / "run" / "x"))

    def fail(*args, **options):
        raise full

    target = {
        "claim": (run_module, "write_json"),
        "logs": (Writer, "flush"),
        "save": (ocp.CheckpointManager, "save"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        assert console.run(train.main, [*least, f"--workdir={tmp_path / 'run'}"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told == [
        f"error: {full.filename}: No space left on device; make room, then give the same command "
        "again"
    ]
    left = [path.name for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]
    assert left == []
    config, _ = configs.parse_config(least)
    assert config is not None
    Run(tmp_path / "run").check_free(config)


@pytest.mark.parametrize(
    ("free", "raised", "expected"),
    [
        (0, ValueError("NOT_FOUND: Error writing d/b10f"), OSError),
        (10**9, ValueError("NOT_FOUND: Error writing d/b10f"), ValueError),
        (0, PermissionError(errno.EACCES, "no", "x"), PermissionError),
    ],
)
def test_a_save_that_fails_for_want_of_room_says_so(tmp_path, monkeypatch, free, raised, expected):
    """Whichever of its writes' errors orbax raises; any other failure stays what it is."""
    saved = checkpoints.Checkpoints(tmp_path)
    state = TrainState(jax.numpy.int32(1), {"network": {"w": np.ones(100, np.float32)}}, {}, ())

    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(expected) as caught:
        saved.save(state)
    assert caught.type is expected
    if expected is OSError:
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("kilobytes", [16, 600])
def test_a_disk_that_is_really_full(tmp_path, cache_dir, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "disk", str(disk)]
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        process = start(disk / "run", cache_dir)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 2, output
        assert "Traceback" not in output
        assert "No space left on device" in output.splitlines()[-1]
        assert not (disk / "run" / "results.json").exists()
        assert [p for p in (disk / "run").rglob("*") if "tmp" in p.name] == []
        if kilobytes < 100:
            return
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(start(disk / "run", cache_dir))
        assert (disk / "run" / "results.json").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_training_in_a_thread(copy, cache_dir):
    found: list[Any] = []
    config = make_config(cache_dir)
    thread = threading.Thread(target=lambda: found.append(train.train(config, copy)))
    thread.start()
    thread.join()
    assert found[0]["results"]


def test_importing_defines_no_flags_and_loads_nothing_that_comes_later():
    code = """
import sys
from absl import flags
import mros_jax.train, importlib
late = {"orbax.checkpoint", "scipy.sparse", "PIL.TiffImagePlugin", "tensorboardX", "matplotlib"}
assert not late & set(sys.modules), late & set(sys.modules)
importlib.reload(mros_jax.train)
assert not {"config", "workdir"} & set(flags.FLAGS)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_resume_wants_a_run(tmp_path):
    with pytest.raises(NotFoundError, match="holds no run; without --resume one is started"):
        train.main(["--config=configs/demo.py", f"--workdir={tmp_path}", "--resume"])


def test_train_needs_a_config(capsys):
    assert console.run(train.main, []) == 2
    assert "give --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("10.0.0.1:1234", None, None), "go together; --num_processes and --process_id not given"),
        ((None, 2, None), "--coordinator_address and --process_id not given"),
        (("127.0.0.1", 2, 0), "'127.0.0.1'; expected HOST:PORT"),
        (("host:70000", 2, 0), "expected HOST:PORT"),
        (("host:1234", 2, 2), "--process_id is 2 of --num_processes 2"),
        (("host:1234", 0, 0), "--process_id is 0 of --num_processes 0"),
    ],
)
def test_addresses_are_checked(given, message):
    with pytest.raises(UserError, match=message):
        parallel.initialize(*given)


def test_waiting_for_slurm_tasks_is_told_and_ends(monkeypatch, caplog):
    def wait(*args, initialization_timeout):
        raise RuntimeError(f"DEADLINE_EXCEEDED after {initialization_timeout} s")

    monkeypatch.setattr(jax.distributed, "initialize", wait)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    caplog.set_level("INFO")
    with pytest.raises(UserError, match=r"the 4 tasks .* in vain .*7 s.*SLURM_STEP_NUM_TASKS=1"):
        parallel.initialize(timeout=7)
    assert "Waiting for the 4 tasks of this SLURM job step, at most 7 seconds" in caplog.text

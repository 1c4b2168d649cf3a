"""What the training tests share: a config that trains in seconds, and real processes."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs import demo
from mros_jax.files import read_jsonl
from mros_jax.runs import checkpoints

JAX_CONFIG: Any = jax.config  # whose fields are made at run time
ROOT = pathlib.Path(__file__).parents[1]

# The tiny config as command-line overrides of configs/demo.py, and as a dict.
TINY = {
    "num_epochs": 3,
    "dataset.preset": "small",
    "batch.identities": 4,
    "batch.images": 2,
    "input.width": 32,
    "eval.every_epochs": 2,
    "eval.rerank_options.ecn.k": 5,
    "checkpoint_every_epochs": 1,
    "log_every_steps": 2,
    "report": False,
}


def make_config(cache_dir, **overrides):
    config = demo.get_config()
    for name, value in {**TINY, "dataset.cache_dir": str(cache_dir), **overrides}.items():
        _set(config, name, value)
    return config.lock()


def _set(config, name, value):
    *path, last = name.split(".")
    for part in path:
        config = config[part]
    config[last] = value


def start(workdir, cache_dir, *flags, devices=1, **overrides):
    """Starts `python -m mros_jax.train` on the tiny config in a process of its own."""
    values = {**TINY, "dataset.cache_dir": str(cache_dir), **overrides}
    words = ["--config=configs/demo.py", *(f"--config.{k}={v}" for k, v in values.items())]
    return start_words(workdir, *words, *flags, devices=devices)


def start_words(workdir, *words, devices=1):
    """Starts `python -m mros_jax.train` with these words in a process of its own."""
    command = [sys.executable, "-m", "mros_jax.train", f"--workdir={workdir}", *words]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": JAX_CONFIG.jax_compilation_cache_dir,
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Waits for a process that must succeed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def assert_equal(a, b):
    """Asserts that two pytrees are bitwise equal."""
    structure: Any = jax.tree.structure(a)
    assert structure == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance):
    """Asserts max |a - b| / max |b| <= tolerance for every leaf."""

    def check(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"

    jax.tree_util.tree_map_with_path(check, a, b)


def read_training_state(workdir):
    """All arrays of the last checkpoint: parameters, statistics, optimizer, step."""
    manager = ocp.CheckpointManager(
        workdir / "checkpoints" / "last", options=ocp.CheckpointManagerOptions(read_only=True)
    )
    step = manager.latest_step()
    args = ocp.args.Composite(training=ocp.args.StandardRestore())
    return manager.restore(step, args=args).training


def read_results(workdir):
    return json.loads((workdir / "results.json").read_text())["results"]


def read_logged_steps(workdir):
    return [r["step"] for r in read_jsonl(workdir / "metrics.jsonl") if r["kind"] == "train"]


def wait_until(condition, process, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def assert_same_run(workdir, reference):
    """Asserts that two finished runs have the same bits, but for clocks."""
    assert_equal(read_training_state(workdir), read_training_state(reference))
    for name in ("metrics.jsonl", "config.json"):
        assert (workdir / name).read_bytes() == (reference / name).read_bytes(), name
    for name in ("last", "best"):
        ours, theirs = (
            checkpoints.load_variables(w / "checkpoints", name) for w in (workdir, reference)
        )
        assert_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
    for here, there in zip(read_results(workdir), read_results(reference), strict=True):
        for name in ("mAP", "mINP", "cmc", "ap", "first_match_rank"):
            assert here[name] == there[name]

"""What the training tests share: a config that trains in seconds, and real processes."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from configs import demo

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
    command = [sys.executable, "-m", "mros_jax.train", "--config=configs/demo.py"]
    command += [f"--config.{name}={value}" for name, value in values.items()]
    command += [f"--workdir={workdir}", *flags]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
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
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance):
    """Asserts max |a - b| / max |b| <= tolerance for every leaf."""

    def check(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"

    jax.tree_util.tree_map_with_path(check, a, b)

"""What training costs: start-up, step with and without the data path, memory.

    python scripts/bench_train.py --config configs/demo.py

Start-up is measured from outside, on whole processes: from the command to the first logged step,
with an empty and with a filled compilation cache. Steps are timed in one process: as the run does
them, and on images that are augmented already. Prints a Markdown table.
"""

import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mros_jax import parallel
from mros_jax.data import augment
from mros_jax.runs import provenance
from mros_jax.training import recipe
from mros_jax.training.feed import Feed

_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", "Config.", lock_config=True)
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps.", 1)

ROOT = pathlib.Path(__file__).resolve().parents[1]


def time_to_first_step(cache: pathlib.Path, workdir: pathlib.Path, overrides: list[str]) -> float:
    """Seconds from starting the training command to its first logged step."""
    command = [sys.executable, "-m", "mros_jax.train", *overrides, f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    log = workdir / "metrics.jsonl"
    since = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None:
            assert process.stderr is not None
            raise SystemExit(process.stderr.read().decode())
        time.sleep(0.01)
    seconds = time.perf_counter() - since
    process.kill()
    process.communicate()
    return seconds


def time_steps(config: Any, dataset: Any, *, with_data: bool) -> float:
    """Median seconds of a training step; without data, on images that are augmented already."""
    feed = Feed(config, dataset)
    model = recipe.make_model(config.model, dataset.num_classes)
    state, step = recipe.build(config, model, feed.sizes.steps_per_epoch)
    step = parallel.MappedStep(step)
    batches = list(feed.epoch(0))
    data: Any = feed.data
    if not with_data:
        images = augment.preprocess(
            np.asarray(jax.device_get(data["images"])), **config.input.to_dict()
        )
        data = {"images": parallel.replicate(images), "labels": data["labels"]}
    augment_batch: Callable[..., Any] = augment.augment_batch
    if not with_data:
        augment_batch = lambda images, keys, **_: images  # noqa: E731
    state = parallel.replicate(state)
    seconds = []
    with mock.patch.object(augment, "augment_batch", augment_batch):
        for i in range(_STEPS.value + 2):  # the first compiles, the second warms up
            since = time.perf_counter()
            state, metrics = step(state, data, batches[i % len(batches)])
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[2:])


def main(argv: list[str]) -> None:
    """Command line."""
    del argv
    config = _CONFIG.value
    dataset = recipe.load_dataset(config)
    overrides = [
        f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}"
    ]  # must come first
    overrides += [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    overrides.append("--config.log_every_steps=1")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        for name in ("cold", "warm"):
            seconds = time_to_first_step(folder / "xla", folder / name, overrides)
            rows.append((f"start-up to first step, {name} compilation cache", f"{seconds:.1f} s"))
    batch = config.batch.identities * config.batch.images
    whole, bare = (time_steps(config, dataset, with_data=flag) for flag in (True, False))
    rows += [
        ("training step", f"{1e3 * whole:.1f} ms, {batch / whole:.0f} images/s"),
        ("the same without the data path", f"{1e3 * bare:.1f} ms, {batch / bare:.0f} images/s"),
        ("share of the data path", f"{100 * (whole - bare) / whole:.1f} %"),
        ("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"),
    ]
    print(
        f"{config.model.backbone}, setting {config.model.setting}, {config.input.height} x "
        f"{config.input.width}, batch {batch}; {provenance.describe_machine()}\n"
    )
    print("| what | measured |\n|---|---|")
    for row in rows:
        print("| {} | {} |".format(*row))


if __name__ == "__main__":
    app.run(main)

"""What training costs: start-up, step with and without the data path, memory.

    python -m scripts.bench_train --config configs/demo.py

Start-up is measured from outside, on whole processes: from the command to the first logged step,
with an empty and with a filled compilation cache. Steps are timed in one process: as the run does
them, and on images that are augmented already.
"""

import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.data import augment
from mros_jax.data.batches import make_sampler
from mros_jax.data.splits import Dataset
from mros_jax.errors import UserError
from mros_jax.training.feed import Feed
from scripts import common


def time_to_first_step(
    cache: pathlib.Path, workdir: pathlib.Path, config_words: Sequence[str]
) -> float:
    """Seconds from starting the training command to its first logged step.

    Raises:
        UserError: the training ended before.
    """
    with common.Training(config_words, workdir, cache) as training:
        return training.wait_for(workdir / "metrics.jsonl")


def time_steps(config: ConfigDict, dataset: Dataset, repeats: int, *, with_data: bool) -> float:
    """Median seconds of a training step; without data, on images that are augmented already.

    Raises:
        UserError: the images do not fit on the device.
    """
    feed = Feed(config, dataset)
    if feed.data is None:
        raise UserError("the images stay in host memory; raise --config.dataset.device_fraction")
    batch, augment_batch, data = next(feed.epoch(0)), None, feed.data
    if not with_data:
        augment_batch = common.keep_images
        stored = np.asarray(jax.device_get(data["images"]))
        ready = augment.preprocess(stored, **config.input.to_dict())
        data = {"images": parallel.replicate(ready), "labels": data["labels"]}
    step = common.Step(config, dataset.num_classes, data, batch, augment_batch=augment_batch)
    seconds = []
    for _ in range(repeats + 2):  # the first compiles, the second warms up
        since = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[2:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    common.add_repeats(parser, 20)
    common.add_markdown(parser)
    config, args = common.parse_with_config(parser, argv)
    dataset = configs.load_dataset(config)
    words = [*args.config_words, "--config.log_every_steps=1"]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        for name in ("cold", "warm"):
            seconds = time_to_first_step(folder / "xla", folder / name, words)
            rows.append((f"start-up to first step, {name} compilation cache", f"{seconds:.1f} s"))
    whole, bare = (
        time_steps(config, dataset, args.repeats, with_data=with_data)
        for with_data in (True, False)
    )
    size = make_sampler(config.batch.to_dict()).size
    rows += [
        ("training step", f"{1e3 * whole:.1f} ms, {size / whole:.0f} images/s"),
        ("the same without the data path", f"{1e3 * bare:.1f} ms, {size / bare:.0f} images/s"),
        ("share of the data path", f"{100 * (whole - bare) / whole:.1f} %"),
        ("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"),
    ]
    what = f"{common.describe_config(config)}; {common.describe_machine()}"
    common.publish(f"{what}\n\n{common.format_table(('what', 'measured'), rows)}", args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

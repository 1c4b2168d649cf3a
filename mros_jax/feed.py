"""Batches of a run, on the devices: a pure function of (seed, step)."""

from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mros_jax import parallel
from mros_jax.data import batches, store
from mros_jax.data.splits import Split
from mros_jax.loop import Sizes


class Feed:
    def __init__(self, config, images):
        self._config = config
        self._labels = images.split.labels
        batch = config.batch.identities * config.batch.images
        steps = batches.steps_per_epoch(len(self._labels), batch)
        self.sizes = Sizes(batch, steps, config.num_epochs * steps)
        self.data = parallel.replicate({"images": images.images, "labels": self._labels})

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        plan = batches.plan_epoch(
            self._labels,
            identities=self._config.batch.identities,
            images=self._config.batch.images,
            seed=self._config.seed,
            epoch=epoch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for indices in plan[first:]:
            yield parallel.split({"indices": indices})


def make_feed(config: ConfigDict, split: Split) -> Feed:
    images = store.load_store(
        split,
        height=config.input.height,
        width=config.input.width,
        cache_dir=config.dataset.cache_dir,
        on_bad_image=config.dataset.on_bad_image,
    )
    return Feed(config, images)

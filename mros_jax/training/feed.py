"""Batches of a run, on the devices: a pure function of (seed, epoch, step in the epoch)."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mros_jax import losses, parallel
from mros_jax.data import batches, store
from mros_jax.data.datasets.splits import Dataset
from mros_jax.training import recipe
from mros_jax.training.loop import Sizes

log = logging.getLogger(__name__)


class Feed:
    """The training images, and what each step gets of them.

    Attributes:
        sizes: images in a batch, steps in an epoch and in the run.
        data: all images and labels on the devices, or None where batches carry theirs.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset):
        images = recipe.load_images(config, dataset.train, progress=parallel.is_main_process())
        assert images.labels is not None
        losses.check_labels(images.labels, dataset.num_classes)
        batch = config.batch.identities * config.batch.images
        steps = batches.steps_per_epoch(len(images), batch)
        self.sizes = Sizes(batch, steps, config.num_epochs * steps)
        self._placed = store.place(
            images, fraction=config.dataset.device_fraction, replicate=parallel.replicate
        )
        log.info("Training images: %s", self._placed.reason)
        self.data = self._placed.data
        self._labels = images.labels
        self._batch = config.batch
        self._seed = config.seed

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """The batches of an epoch from its step `first` on, split over this process's devices."""
        plan = batches.plan_epoch(
            self._labels,
            identities=self._batch.identities,
            images=self._batch.images,
            seed=self._seed,
            epoch=epoch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return iter(self._placed.batches(plan[first:], parallel.split))

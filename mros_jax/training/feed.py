"""Batches of a run, on the devices: a pure function of (seed, epoch, step in the epoch)."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import losses, parallel
from mros_jax.data import batches, store
from mros_jax.data.splits import Dataset

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many images make a step, steps an epoch, and steps the run."""

    batch: int
    steps_per_epoch: int
    total_steps: int


class Feed:
    """The training images, and what each step gets of them.

    Attributes:
        sizes: images in a batch, steps in an epoch and in the run.
        data: all images and labels on the devices, or None where batches carry theirs.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset):
        images = configs.load_images(config, dataset.train, progress=parallel.is_main_process())
        self._labels = store.labels_of(images)
        self._camids = images.split.camids
        losses.check_labels(self._labels, dataset.num_classes)
        self._sampler = batches.make_sampler(config.batch.to_dict())
        steps = self._sampler.steps(self._labels)
        total = config.num_steps or config.num_epochs * steps
        self.sizes = Sizes(self._sampler.size, steps, total)
        self._placed = store.place(
            images, fraction=config.dataset.device_fraction, replicate=parallel.replicate
        )
        log.info("Training images: %s", self._placed.reason)
        self.data = self._placed.data
        self._seed = config.seed

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """The batches of an epoch from its step `first` on, split over this process's devices.

        The run may end within the epoch.
        """
        plan = self._sampler.plan(
            self._labels,
            self._camids,
            seed=self._seed,
            epoch=epoch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        end = self.sizes.total_steps - epoch * self.sizes.steps_per_epoch  # of the run
        return iter(self._placed.batches(plan[first:end], parallel.split))

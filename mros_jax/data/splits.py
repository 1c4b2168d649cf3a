"""A data set as the rest of the project sees it: names, identities, cameras, and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mros_jax.data.images import Images
from mros_jax.errors import UserError

JUNK_PID = -1
DISTRACTOR_PID = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """One of "train", "query" and "gallery"; row i of every array is image i.

    Attributes:
        name: "train", "query" or "gallery".
        names: (N,) str, file names, unique in the split; for errors, reports and ranked lists.
        pids: (N,) int64, the identity as distributed; -1 is junk, 0 a distractor.
        camids: (N,) int64, the camera as distributed (most data sets count from 1).
        sequences: (N,) int64, the recording within the camera; 0 where names carry none.
        images: the images themselves.
        labels: (N,) int32 in 0..C-1 for training splits, otherwise None.
    """

    name: str
    names: np.ndarray
    pids: np.ndarray
    camids: np.ndarray
    sequences: np.ndarray
    images: Images
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in ("pids", "camids", "sequences", "labels"):
            column = getattr(self, field)
            if column is not None and column.shape != self.names.shape:
                raise UserError(
                    f"split {self.name!r}: {field} has shape {column.shape}, "
                    f"names has {self.names.shape}; one entry for each image is expected"
                )
        if len(self.images) != len(self.names):
            raise UserError(
                f"split {self.name!r}: {len(self.images)} images for {len(self.names)} names"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def junk(self) -> np.ndarray:
        """(N,) bool: images that count neither as a match nor as a place in a ranking."""
        junk: np.ndarray = self.pids == JUNK_PID
        return junk

    @property
    def distractors(self) -> np.ndarray:
        """(N,) bool: images that stay in the gallery and never match."""
        distractors: np.ndarray = self.pids == DISTRACTOR_PID
        return distractors

    def select(self, indices: np.ndarray) -> Split:
        """Return the split with only these images, in this order; labels keep their numbers."""
        rows = np.asarray(indices)
        return dataclasses.replace(
            self,
            names=self.names[rows],
            pids=self.pids[rows],
            camids=self.camids[rows],
            sequences=self.sequences[rows],
            images=self.images.select(rows),
            labels=None if self.labels is None else self.labels[rows],
        )


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What a reader left out, and why.

    Attributes:
        message: one sentence with the place and the number of them.
        names: all of them.
        harmless: junk and distractors in a training split, which no reader keeps.
    """

    message: str
    names: tuple[str, ...]
    harmless: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training images, queries and gallery.

    Attributes:
        name: the name given to `load_dataset`.
        train: training split, with labels.
        query: query split.
        gallery: gallery split, junk and distractors included.
        pid_of_label: (C,) int64, the distributed pid of every training label.
        skipped: what was left out while reading.
        options: the options that it was read with.
    """

    name: str
    train: Split
    query: Split
    gallery: Split
    pid_of_label: np.ndarray
    skipped: tuple[Skipped, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of training identities C."""
        return len(self.pid_of_label)

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Training, query and gallery split, in this order."""
        return self.train, self.query, self.gallery


def relabel(pids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the training identities 0..C-1 in ascending order of pid.

    Args:
        pids: (N,) identities as distributed.

    Returns:
        labels (N,) int32 and pid_of_label (C,) int64, with `pid_of_label[labels] == pids`.
    """
    pid_of_label, labels = np.unique(pids, return_inverse=True)
    return labels.reshape(-1).astype(np.int32), pid_of_label.astype(np.int64)

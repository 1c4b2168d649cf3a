"""A data set as the rest of the project sees it: names, identities, cameras, and image bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

JUNK_PID = -1
DISTRACTOR_PID = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """One of "train", "query" and "gallery"; row i of every array is image i.

    Attributes:
      name: "train", "query" or "gallery".
      names: (N,) str, file names, unique in the split; for errors, reports and ranked lists.
      pids: (N,) int32, the identity as distributed; -1 is junk, 0 a distractor.
      camids: (N,) int32, the camera as distributed (most data sets count from 1).
      sequences: (N,) int32, the recording within the camera; 0 where names carry none.
      labels: (N,) int32 in 0..C-1 for training splits, otherwise None.
      reader: `reader(i)` returns the encoded bytes (JPEG, PNG, ...) of image i as they are on disk.
        It must be safe to call from several threads.
      pixels: for rendered data sets instead of `reader`: returns all images, uint8 (N, H, W, 3).
      pixels_key: names what `pixels` returns (parameters and version of the renderer), so that it
        can be cached on disk; None means never cached.
    """

    name: str
    names: np.ndarray
    pids: np.ndarray
    camids: np.ndarray
    sequences: np.ndarray
    labels: np.ndarray | None = None
    reader: Callable[[int], bytes] | None = None
    pixels: Callable[[], np.ndarray] | None = None
    pixels_key: str | None = None

    def __post_init__(self) -> None:
        for field in ("pids", "camids", "sequences", "labels"):
            column = getattr(self, field)
            if column is not None and column.shape != self.names.shape:
                raise ValueError(
                    f"split {self.name!r}: {field} has shape {column.shape}, "
                    f"names has {self.names.shape}; one entry per image is expected"
                )
        if (self.reader is None) == (self.pixels is None):
            raise ValueError(f"split {self.name!r} needs a reader or pixels, and not both")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def junk(self) -> np.ndarray:
        """(N,) bool: images that count neither as a match nor as a place in a ranking."""
        return self.pids == JUNK_PID

    @property
    def distractors(self) -> np.ndarray:
        """(N,) bool: images of nobody, which stay in the gallery and never match."""
        return self.pids == DISTRACTOR_PID

    def read(self, i: int) -> bytes:
        """Returns the encoded bytes of image i.

        Raises:
          ValueError: the split is rendered and has no files.
        """
        if self.reader is None:
            raise ValueError(
                f"split {self.name!r} is rendered, not read from files: use pixels(), not read(i)"
            )
        return self.reader(int(i))

    def select(self, indices: np.ndarray) -> Split:
        """Returns the split with only these images, in this order; labels keep their numbers."""
        rows = np.asarray(indices)
        reader, pixels = self.reader, self.pixels
        key = None
        if self.pixels_key is not None:
            key = f"{self.pixels_key}[{','.join(map(str, rows.tolist()))}]"
        return dataclasses.replace(
            self,
            names=self.names[rows],
            pids=self.pids[rows],
            camids=self.camids[rows],
            sequences=self.sequences[rows],
            labels=None if self.labels is None else self.labels[rows],
            reader=None if reader is None else lambda i: reader(int(rows[i])),
            pixels=None if pixels is None else lambda: pixels()[rows],
            pixels_key=key,
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training images, queries and gallery.

    Attributes:
      name: the name given to `load_dataset`.
      train: training split, with labels.
      query: query split.
      gallery: gallery split, junk and distractors included.
      pid_of_label: (C,) int32, the distributed pid of every training label.
    """

    name: str
    train: Split
    query: Split
    gallery: Split
    pid_of_label: np.ndarray

    @property
    def num_classes(self) -> int:
        """Number of training identities C."""
        return len(self.pid_of_label)

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Training, query and gallery split, in this order."""
        return self.train, self.query, self.gallery


def relabel(pids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the training identities 0..C-1 in ascending order of pid.

    Args:
      pids: (N,) identities as distributed.

    Returns:
      labels (N,) int32 and pid_of_label (C,) int32, with `pid_of_label[labels] == pids`.
    """
    pid_of_label, labels = np.unique(pids, return_inverse=True)
    return labels.reshape(-1).astype(np.int32), pid_of_label.astype(np.int32)

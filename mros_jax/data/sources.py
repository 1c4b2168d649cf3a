"""Data sets by name: the directory layouts as distributed, one's own images, and the embedded one."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

from mros_jax.data import layouts
from mros_jax.data.splits import Dataset, Split, relabel

__all__ = ["DATASETS", "Dataset", "Split", "load_dataset", "relabel"]


def _load_synthetic(**options: Any) -> Dataset:
    from mros_jax.data import synthetic  # the renderer is compiled only where it is asked for

    return synthetic.make_dataset(**options)


# name: how to read it. Options beyond the root are the reader's keyword arguments.
DATASETS: dict[str, Callable[..., Dataset]] = {
    "market1501": layouts.read_market1501,
    "folder": layouts.read_folder,
    "synthetic": _load_synthetic,
}


def load_dataset(name: str, root: str | os.PathLike[str] | None = None, **options: Any) -> Dataset:
    """Reads a data set: names and identities now, images when they are asked for.

    Args:
      name: one of `DATASETS`.
      root: the directory with the data; for `synthetic` there is none.
      **options: the reader's own, for example `distractors_500k=True` for Market-1501 or
        `num_train_pids=20` for `synthetic`; see the functions in `DATASETS`.

    Returns:
      The data set; training pids are numbered 0..C-1, `pid_of_label` has the originals.

    Raises:
      ValueError: an unknown name, a misnamed file, an empty split.
      FileNotFoundError: no data at `root`; the message says where to ask for it.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(sorted(DATASETS))}")
    if name == "synthetic":
        if root is not None:
            raise ValueError(
                f"the synthetic data set is rendered and takes no root, got {root!s}; to read images "
                "that it wrote to a directory use market1501"
            )
        return DATASETS[name](**options)
    if root is None:
        raise FileNotFoundError(layouts.missing(name, None))
    return DATASETS[name](pathlib.Path(root), **options)

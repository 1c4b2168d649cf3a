"""Data sets by name: as distributed, one's own images, and the embedded one."""

from __future__ import annotations

import functools
import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Any

from mros_jax.data.datasets import cuhk03, layouts, msmt17
from mros_jax.data.datasets.splits import Dataset, Split, relabel

__all__ = ["DATASETS", "Dataset", "Split", "load_dataset", "relabel"]


def _load_synthetic(preset: str | None = None, **options: Any) -> Dataset:
    from mros_jax.data.synthetic import (
        dataset as synthetic,
    )

    if preset is None:
        return synthetic.make_dataset(**options)
    if preset not in synthetic.PRESETS:
        raise ValueError(
            f"unknown preset {preset!r} of the synthetic data set; "
            f"there are {', '.join(synthetic.PRESETS)}"
        )
    return synthetic.make_dataset(**{**synthetic.PRESETS[preset], **options})


# name: how to read it. Options beyond the root are the reader's keyword arguments.
DATASETS: dict[str, Callable[..., Dataset]] = {
    "market1501": layouts.read_market1501,
    "dukemtmc": layouts.read_dukemtmc,
    "msmt17": functools.partial(msmt17.read_msmt17, version=1),
    "msmt17_v2": functools.partial(msmt17.read_msmt17, version=2),
    "cuhk03_labeled": functools.partial(cuhk03.read_new_protocol, kind="labeled"),
    "cuhk03_detected": functools.partial(cuhk03.read_new_protocol, kind="detected"),
    "cuhk03_labeled_classic": functools.partial(cuhk03.read_classic, kind="labeled"),
    "cuhk03_detected_classic": functools.partial(cuhk03.read_classic, kind="detected"),
    "folder": layouts.read_folder,
    "synthetic": _load_synthetic,
}


def load_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    on_bad_image: str = "error",
    **options: Any,
) -> Dataset:
    """Reads a data set: names and identities now, images when they are asked for.

    Args:
      name: one of `DATASETS`.
      root: the directory with the data as distributed, or a TFDS data directory in which
        `mros_jax.data.datasets.prepared` has prepared them; for `synthetic` there is none.
      on_bad_image: what to do about files that are not named as the layout asks: "error", or "skip"
        with a warning that counts them.
      **options: the reader's own: `distractors_500k` for Market-1501, `include_val` for MSMT17,
        `test_set` for the classic CUHK03; `preset` and everything that `synthetic.make_dataset`
        takes for `synthetic`.

    Returns:
      The data set; training pids are numbered 0..C-1, `pid_of_label` has the originals.

    Raises:
      ValueError: an unknown name or option, a misnamed file, an empty split.
      FileNotFoundError: no data at `root`; the message says where to ask for it.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(sorted(DATASETS))}")
    layouts.check_choice(on_bad_image)
    if name == "synthetic":
        if root is not None:
            raise ValueError(
                f"the synthetic data set is rendered and takes no root, got {root!s}; to read "
                "images that were written to a directory use market1501"
            )
        return _load_synthetic(**options)
    accepted = _list_options(name)
    unknown = sorted(set(options) - accepted)
    if unknown:
        others = sorted(accepted - {"on_bad_image"})
        raise ValueError(
            f"data set {name!r} has no option {', '.join(unknown)}; "
            f"it has {', '.join(others) or 'none'}"
        )
    if root is None:
        raise FileNotFoundError(layouts.missing(name, None))
    path = pathlib.Path(root).expanduser()
    if _is_tfds_directory(path):
        from mros_jax.data.datasets import (
            prepared as tfds_builders,
        )

        return tfds_builders.load_prepared(name, path, **options)
    if "on_bad_image" in accepted:  # the classic CUHK03 has no file names
        options["on_bad_image"] = on_bad_image
    return DATASETS[name](path, **options)


def _list_options(name: str) -> set[str]:
    """Returns the names of a reader's keyword arguments that are still free."""
    reader = DATASETS[name]
    bound = reader.keywords if isinstance(reader, functools.partial) else {}
    return set(list(inspect.signature(reader).parameters)[1:]) - set(bound)


def _is_tfds_directory(path: pathlib.Path) -> bool:
    """Whether a TFDS builder of ours has prepared something here: builder/config/version."""
    return any(
        next((path / builder).glob("*/*/features.json"), None)
        for builder in ("market1501", "dukemtmc", "msmt17", "cuhk03")
    )

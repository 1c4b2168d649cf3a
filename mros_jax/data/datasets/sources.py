"""Data sets by name: as distributed, one's own images, and the embedded one."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from mros_jax.data.datasets import records
from mros_jax.data.datasets.layouts import MissingDataError, check_choice
from mros_jax.data.splits import Dataset
from mros_jax.errors import NotFoundError, UserError


def load_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    on_bad_image: str = "error",
    **options: Any,
) -> Dataset:
    """Read a data set: names and identities now, images when they are asked for.

    Args:
        name: one of `records.DATASETS`.
        root: the directory with the data as distributed, or a TFDS data directory in which
            `mros_jax.data.datasets.prepared` has prepared them; None for `synthetic`.
        on_bad_image: what to do about files that are not named as the layout asks: "error", or
            "skip" to leave them out; `Dataset.skipped` has them, and the log counts them.
        **options: see `records.options_of`. Those of other data sets are taken at their defaults.

    Returns:
        The data set; training pids are numbered 0..C-1, `pid_of_label` has the originals.

    Raises:
        UserError: an unknown name or option, a misnamed file, an empty split.
        NotFoundError: no data at `root`; the message says where to ask for it.
        PermissionError: a directory may not be read.
    """
    record = records.find_record(name)
    check_choice(on_bad_image)
    chosen = record.choose(options)
    path = None if root is None else pathlib.Path(root).expanduser()
    if record.is_rendered and path is not None:
        raise UserError(
            f"data set {name!r} is rendered and takes no root, got {path}; images that were "
            "written to a directory are read as market1501"
        )
    if not record.is_rendered and path is None:
        raise NotFoundError(record.missing(None))
    if path is not None and _is_prepared(path):
        from mros_jax.data.datasets import prepared  # TensorFlow Datasets are slow to import

        dataset = prepared.load_prepared(name, path, **chosen)
    else:
        try:
            dataset = records.read(record, path, on_bad_image, chosen)
        except MissingDataError as error:
            raise NotFoundError(record.missing(path, str(error))) from error
    return dataclasses.replace(dataset, name=name, options=chosen)


def _is_prepared(path: pathlib.Path) -> bool:
    """Whether a TFDS builder of ours has prepared something here: builder/config/version."""
    builders = {record.builder for record in records.DATASETS.values() if record.builder}
    return any(next((path / b).glob("*/*/features.json"), None) for b in builders)

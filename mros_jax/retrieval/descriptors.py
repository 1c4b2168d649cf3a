"""Descriptors on disk, ours and anybody's: `.npz` files with named arrays."""

import collections
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mros_jax.errors import NotFoundError, UserError
from mros_jax.files import write_atomically
from mros_jax.retrieval.inputs import check_ids

ARRAYS = (
    "query_features",
    "gallery_features",
    "query_pids",
    "gallery_pids",
    "query_camids",
    "gallery_camids",
)
_PARTS = ("features", "pids", "camids")


def save_features(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Write arrays to a `.npz` file, atomically."""
    with write_atomically(path, "wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))


def load_arrays(path: str | os.PathLike, required: Iterable[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a `.npz` file.

    Args:
        path: the file.
        required: arrays that it must hold.

    Raises:
        NotFoundError: no such file.
        UserError: not a `.npz` file, or an array that is missing, there twice, or cannot be read;
            names the file and the array.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    # A damaged file may raise nearly anything: numpy and zipfile check little of what they parse.
    try:
        # numpy.load leaves a broken file open if it opened it itself.
        stream = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with stream:
        try:
            file = np.load(stream, allow_pickle=False)
        except Exception as error:
            raise UserError(
                f"{path} is not a complete .npz file of arrays (as np.savez writes it): {error}"
            ) from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is one array; expected an .npz file of named arrays")
        names = collections.Counter(file.files)
        missing = [name for name in required if name not in names]
        if missing:
            raise UserError(
                f"{path} lacks {', '.join(missing)}; it holds {', '.join(names) or 'nothing'}, "
                f"expected are {', '.join(required)}"
            )
        for name, times in names.items():
            if times > 1:
                raise UserError(f"{path} holds {name} {times} times; expected one of each name")
        return {name: _read_array(file, name, path) for name in names}


def _read_array(file: Any, name: str, path: pathlib.Path) -> np.ndarray:
    try:
        array = file[name]
    except Exception as error:
        if "pickle" in str(error):
            raise UserError(
                f"{path}: {name} holds Python objects, which cannot be read safely; save plain "
                "numbers (or names as np.str_)"
            ) from error
        raise UserError(f"{path}: {name} cannot be read; the file is damaged: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: {name} is no array; expected an .npz file as np.savez writes it")
    return array


def load_features(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read one file with all six arrays of `ARRAYS`, and whatever else it holds.

    Raises:
        NotFoundError, UserError: as `load_arrays`; arrays of types or shapes that do not fit.
    """
    arrays = load_arrays(path, ARRAYS)
    for split in ("query", "gallery"):
        _check_split(arrays, f"{split}_", path)
    return arrays


def load_feature_pair(
    query_path: str | os.PathLike, gallery_path: str | os.PathLike
) -> dict[str, np.ndarray]:
    """Read two files, each with `features`, `pids` and `camids`, as one dict named as in `ARRAYS`.

    Raises:
        NotFoundError, UserError: as `load_features`.
    """
    result: dict[str, np.ndarray] = {}
    for split, path in (("query", query_path), ("gallery", gallery_path)):
        arrays = load_arrays(path, _PARTS)
        _check_split(arrays, "", path)
        result |= {f"{split}_{name}": array for name, array in arrays.items()}
    return result


def _check_split(arrays: dict[str, np.ndarray], prefix: str, path: str | os.PathLike) -> None:
    """Check the arrays of one split against each other; labels become int64."""
    name = f"{prefix}features"
    features = arrays[name]
    if features.dtype.kind == "V":
        raise UserError(
            f"{path}: {name} has type {features.dtype}, {features.dtype.itemsize} bytes without a "
            "meaning: NumPy saves types that it does not know (such as bfloat16) so. Save it as "
            "float32: np.asarray(features, np.float32)"
        )
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind not in "fiub":
        raise UserError(
            f"{path}: {name} has shape {features.shape} and type {features.dtype}; expected "
            "numbers of shape (images, features), not empty"
        )
    for part in ("pids", "camids"):
        own = f"{prefix}{part}"
        arrays[own] = check_ids(arrays[own], f"{path}: {own}", len(features))
    names = arrays.get(f"{prefix}names")
    if names is None:
        return
    if names.shape != (len(features),) or names.dtype.kind != "U":
        raise UserError(
            f"{path}: {prefix}names has shape {names.shape} and type {names.dtype}; expected text "
            f"of shape ({len(features)},), one for each row of {name}"
        )
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        twice = unique[np.argmax(counts > 1)]
        rows = np.flatnonzero(names == twice)
        raise UserError(
            f"{path}: {prefix}names has {str(twice)!r} in rows {rows[0]} and {rows[1]}; expected "
            "another name for each image"
        )

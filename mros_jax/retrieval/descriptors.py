"""Descriptors on disk, ours and anybody's: `.npz` files with named arrays, or MATLAB's `.mat`.

Those that are too many for memory: directories with a `.npy` file for each array, which are mapped.

Of a network that has further descriptors, such as those of early exits, `exits` (E,) has their
names, `query_exit_NAME` and `gallery_exit_NAME` (N, D) are theirs, and `multiply_adds` (E + 1,) is
what each takes, the main descriptor last.

Of a network that has learned to compare pairs of images, `pair_kernel` (K, D / K, 2) and
`pair_bias` (K, 2) are K heads that each give two logits of any of K equal groups of a descriptor's
numbers: the squared differences of two images times the kernel, and the bias; of the classes that
they are of two identities and that they are of one. Learned re-ranking takes them from there.
"""

import collections
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
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
PAIR_ARRAYS = ("pair_kernel", "pair_bias")
# What layumi/Person_reID_baseline_pytorch and the many codes that began with it save as
# pytorch_result.mat; in their order those of `ARRAYS`.
MATLAB_ARRAYS = (
    "query_f",
    "gallery_f",
    "query_label",
    "gallery_label",
    "query_cam",
    "gallery_cam",
)


def save_features(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write arrays to a `.npz` file, atomically.

    Raises:
        ValueError: an array of Python objects, which could only be pickled.
    """
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise ValueError(f"{name} is an array of Python objects; expected numbers or texts")
    with write_atomically(path, "wb") as file:
        np.savez(file, **arrays)


def load_arrays(path: str | os.PathLike[str], required: Iterable[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a `.npz` file, or map those of a directory of `.npy` files into memory.

    Args:
        path: the file; or the directory, in which `NAME.npy` is the array of that name.
        required: arrays that it must hold.

    Raises:
        NotFoundError: no such file.
        UserError: not a `.npz` file, or an array that is missing, there twice, or cannot be read;
            names the file and the array.
    """
    if pathlib.Path(path).is_dir():
        return _map_arrays(pathlib.Path(path), required)
    path = _find_file(path)
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
        _check_names(names, required, path)
        for name, times in names.items():
            if times > 1:
                raise UserError(f"{path} holds {name} {times} times; expected one of each name")
        return {name: _read_array(file, name, path) for name in names}


def _map_arrays(path: pathlib.Path, required: Iterable[str]) -> dict[str, np.ndarray]:
    files = {file.stem: file for file in sorted(path.glob("*.npy"))}
    _check_names(files, required, path)
    arrays = {}
    for name, file in files.items():
        try:
            arrays[name] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        except Exception as error:  # a damaged header may raise nearly anything
            raise UserError(
                f"{file} is not a complete .npy file (as np.save writes it): {error}"
            ) from error
    return arrays


def _check_names(names: Collection[str], required: Iterable[str], path: pathlib.Path) -> None:
    if missing := [name for name in required if name not in names]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(names) or 'nothing'}, "
            f"expected are {', '.join(required)}"
        )


def _find_file(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    return path


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


def load_features(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read one file (or directory) with all six arrays of `ARRAYS`, and whatever else it holds.

    Args:
        path: `.npz`, a directory of `.npy` files, or a `.mat` file with those of `MATLAB_ARRAYS`.

    Raises:
        NotFoundError, UserError: as `load_arrays`; arrays of types or shapes that do not fit.
    """
    is_matlab = pathlib.Path(path).suffix == ".mat"
    arrays = _load_matlab(path) if is_matlab else load_arrays(path, ARRAYS)
    for split in ("query", "gallery"):
        _check_split(arrays, f"{split}_", path)
    _check_exits(arrays, path)
    _check_pairs(arrays, path)
    return arrays


def _load_matlab(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of `MATLAB_ARRAYS` in a file, by their names in `ARRAYS`."""
    import scipy.io

    path = _find_file(path)
    try:
        file = scipy.io.loadmat(path, variable_names=MATLAB_ARRAYS)
    except NotImplementedError as error:
        raise UserError(f"{path} is a MATLAB file of version 7.3; save it without -v7.3") from error
    except Exception as error:  # scipy raises many types on damaged files
        raise UserError(f"{path} is not a complete MATLAB file: {error}") from error
    if missing := [name for name in MATLAB_ARRAYS if name not in file]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; expected are {', '.join(MATLAB_ARRAYS)}"
        )
    arrays = dict(zip(ARRAYS, map(file.__getitem__, MATLAB_ARRAYS), strict=True))
    # MATLAB has no vectors: labels are rows or columns.
    return {name: x if name.endswith("features") else x.ravel() for name, x in arrays.items()}


def list_exits(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Names of the further descriptors, the cheapest first."""
    return tuple(map(str, arrays.get("exits", ())))


def choose_descriptor(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The same arrays with one of the descriptors alone.

    Args:
        arrays: of `load_features`.
        name: "descriptor", or an exit.

    Raises:
        UserError: there is no such descriptor; lists those that there are.
    """
    exits = list_exits(arrays)
    if name not in ("descriptor", *exits):
        there = ", ".join(("descriptor", *exits))
        raise UserError(f"there is no descriptor {name!r}; expected one of {there}")
    others = {f"{split}_exit_{exit}" for split in ("query", "gallery") for exit in exits}
    others |= {"exits", "multiply_adds", *(() if name == "descriptor" else PAIR_ARRAYS)}
    chosen = {key: array for key, array in arrays.items() if key not in others}
    if name != "descriptor":
        for split in ("query", "gallery"):
            chosen[f"{split}_features"] = arrays[f"{split}_exit_{name}"]
    return chosen


def load_feature_pair(
    query_path: str | os.PathLike[str], gallery_path: str | os.PathLike[str]
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


def _check_exits(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    named = np.asarray(arrays.get("exits", np.zeros(0, np.str_)))
    if named.ndim != 1 or named.dtype.kind != "U":
        raise UserError(
            f"{path}: exits has shape {named.shape} and type {named.dtype}; expected names"
        )
    exits = list_exits(arrays)
    for split in ("query", "gallery"):
        for name in (f"{split}_exit_{exit}" for exit in exits):
            if name not in arrays:
                raise UserError(f"{path} lacks {name}, and its exits are {', '.join(exits)}")
            _check_features(arrays[name], name, path)
            count, expected = len(arrays[name]), len(arrays[f"{split}_features"])
            if count != expected:
                raise UserError(f"{path}: {name} has {count} rows; expected {expected}")
    counts = np.asarray(arrays.get("multiply_adds", np.zeros(0)))
    if exits and (counts.shape != (len(exits) + 1,) or counts.dtype.kind not in "iu"):
        raise UserError(
            f"{path}: multiply_adds has shape {counts.shape} and type {counts.dtype}; expected "
            f"{len(exits) + 1} whole numbers, one for each exit and the last for the descriptor"
        )


def _check_pairs(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    there = [name for name in PAIR_ARRAYS if name in arrays]
    if not there:
        return
    size = arrays["query_features"].shape[1]
    kernel, bias = (np.asarray(arrays.get(name, ())) for name in PAIR_ARRAYS)
    groups = len(np.atleast_1d(bias))
    if (
        bias.shape != (groups, 2)
        or kernel.shape != (groups, size // max(groups, 1), 2)
        or kernel[..., 0].size != size
        or not all(x.dtype.kind == "f" and np.isfinite(x).all() for x in (kernel, bias))
    ):
        raise UserError(
            f"{path}: pair_kernel has shape {kernel.shape} and pair_bias {bias.shape}; expected "
            f"numbers of shape (K, {size} / K, 2) and (K, 2), without NaN and infinity"
        )


def _check_split(arrays: dict[str, np.ndarray], prefix: str, path: str | os.PathLike[str]) -> None:
    """Check the arrays of one split against each other; labels become int64."""
    name = f"{prefix}features"
    features = arrays[name]
    _check_features(features, name, path)
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


def _check_features(features: np.ndarray, name: str, path: str | os.PathLike[str]) -> None:
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

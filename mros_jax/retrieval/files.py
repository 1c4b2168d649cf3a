"""Descriptors on disk, ours and anybody's: `.npz` files with named arrays."""

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

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
    """Write arrays to a `.npz` file under a temporary name, then rename it."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: str | os.PathLike, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read all arrays of a `.npz` file.

    Args:
        path: the file.
        required: arrays that it must hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a `.npz` file, or arrays are missing; names those expected and those found.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        # numpy.load leaves a broken file open if it opened it itself.
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError(f"{path} is one array; expected an .npz file of named arrays")
            missing = [name for name in required if name not in file]
            if missing:
                raise ValueError(
                    f"{path} lacks {', '.join(missing)}; it holds "
                    f"{', '.join(file.files) or 'nothing'}, expected are {', '.join(required)}"
                )
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    except ValueError as error:
        if "pickle" in str(error):
            raise ValueError(
                f"{path} is no .npz file of plain arrays (strings as objects cannot be read "
                "safely); write it with np.savez and whole numbers for pids and camids"
            ) from error
        raise


def load_features(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read one file with all six arrays of `ARRAYS`, and whatever else it holds.

    Raises:
        FileNotFoundError, ValueError: as `load_arrays`.
    """
    return load_arrays(path, ARRAYS)


def load_feature_pair(
    query_path: str | os.PathLike, gallery_path: str | os.PathLike
) -> dict[str, np.ndarray]:
    """Read two files, each with `features`, `pids` and `camids`, as one dict named as in `ARRAYS`.

    Raises:
        FileNotFoundError, ValueError: as `load_arrays`.
    """
    paths = {"query": query_path, "gallery": gallery_path}
    return {
        f"{split}_{name}": array
        for split, path in paths.items()
        for name, array in load_arrays(path, _PARTS).items()
    }

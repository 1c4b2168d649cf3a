"""Decoded images on disk: whole files or none, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import time
import uuid
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mros_jax.files import cache_directory

Images = UInt8[np.ndarray, "N H W 3"]
_STALE_SECONDS = 24 * 3600
_BLOCK = 64 << 20


def directory(chosen: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the directory chosen, or `mros_jax/images` in the user's cache directory."""
    if chosen is not None:
        return pathlib.Path(chosen).expanduser()
    return cache_directory("images")


def load(path: pathlib.Path) -> tuple[pathlib.Path, Images, dict[str, Any]] | None:
    """Returns the file's path, images (memory-mapped) and description; None if they are not there.

    A file that something else has damaged is reported by a warning and treated as not there.
    """
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        images = np.load(path, mmap_mode="r")
        if images.dtype != np.uint8 or list(images.shape) != meta["shape"]:
            raise ValueError(f"holds {images.dtype} {images.shape}, expected uint8 {meta['shape']}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"image cache {path} cannot be used ({error}); decoding again", stacklevel=3)
        return None
    return path, images, meta


def save(path: pathlib.Path, images: Images, meta: dict[str, Any], on_error: str) -> Images | None:
    """Writes images and their description; returns the images memory-mapped.

    Both are written under temporary names and renamed, the images last. Ordinary writes are used
    rather than a memory map: on a full disk a map would kill the process.

    Returns:
      The memory-mapped images, or None after a warning if they could not be written.

    Raises:
      OSError: they could not be written and `on_error` is "error".
    """
    mark = f".{uuid.uuid4().hex}.tmp"
    temporary = path.with_name(path.name + mark)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        free = shutil.disk_usage(path.parent).free
        if free < images.nbytes:
            raise OSError(f"{images.nbytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
        described = path.with_suffix(".json" + mark)
        described.write_text(json.dumps({**meta, "shape": list(images.shape)}))
        os.replace(described, path.with_suffix(".json"))
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, np.lib.format.header_data_from_array_1_0(images)
            )
            flat = memoryview(np.ascontiguousarray(images).reshape(-1))
            for start in range(0, len(flat), _BLOCK):
                file.write(flat[start : start + _BLOCK])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return np.load(path, mmap_mode="r")
    except OSError as error:
        for leftover in (temporary, path.with_suffix(".json" + mark)):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        text = (
            f"decoded images cannot be kept in {path.parent} ({error}); "
            "choose another place with dataset.cache_dir"
        )
        if on_error == "error":
            raise OSError(text) from error
        warnings.warn(f"{text}. Going on with the images in memory", stacklevel=3)
        return None


def _remove_stale(where: pathlib.Path) -> None:
    """Removes what writers killed long ago left behind."""
    for leftover in where.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()

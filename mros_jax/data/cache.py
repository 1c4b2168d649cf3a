"""Decoded images on disk: whole files or none, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import time
import uuid
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mros_jax.files import cache_directory

log = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600
_BLOCK = 64 << 20


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A split, decoded.

    Attributes:
        images: those that can be decoded, in order.
        native: whether they have the size of their files, which all share.
        skipped: row of the split -> why its image cannot be decoded.
        changed: row of the split -> what was done to its image, see `decoding.Decoded`.
    """

    images: UInt8[np.ndarray, "N H W 3"]
    native: bool
    skipped: dict[int, str]
    changed: dict[int, tuple[str, ...]]


def directory(chosen: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Return the directory chosen, or `mros_jax/images` in the user's cache directory."""
    if chosen is not None:
        return pathlib.Path(chosen).expanduser()
    return cache_directory("images")


def load(path: pathlib.Path, count: int) -> Decoding | None:
    """Load a split's images, memory-mapped; None if they are not there.

    Files that something else has damaged or exchanged are reported and treated as not there.

    Args:
        path: the `.npy` file; its description lies beside it.
        count: images of the split, those that cannot be decoded included.
    """
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        images = np.load(path, mmap_mode="r")
        return _check(meta, images, path.stem, count)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # NumPy and json raise many types on damaged files
        log.warning("Image cache %s cannot be used (%s); decoding again", path, error)
        return None


def _check(meta: Any, images: Any, key: str, count: int) -> Decoding:
    if not isinstance(meta, dict) or meta.get("key") != key:
        raise ValueError("its description belongs to other images")
    skipped = {int(row): str(reason) for row, reason in meta["skipped"].items()}
    changed = {int(row): tuple(map(str, changes)) for row, changes in meta["changed"].items()}
    expected = [count - len(skipped), *meta["shape"][1:]]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise ValueError("expected an array of uint8")
    if images.ndim != 4 or list(images.shape) != expected or images.shape[-1] != 3:
        raise ValueError(f"holds {images.shape}, expected {expected}")
    if not {*skipped, *changed} <= set(range(count)):
        raise ValueError("its description names rows that are not there")
    return Decoding(images, bool(meta["native"]), skipped, changed)


def save(path: pathlib.Path, decoding: Decoding) -> Decoding:
    """Write images and their description, and map them into memory.

    Both are written under temporary names and renamed, the images last. Ordinary writes are used
    rather than a memory map: on a full disk a map would kill the process.

    Returns:
        The same with memory-mapped images; as it was, after a message, if they cannot be written.
    """
    mark = f".{uuid.uuid4().hex}.tmp"
    temporary = path.with_name(path.name + mark)
    described = path.with_suffix(".json" + mark)
    images = decoding.images
    meta = {
        "key": path.stem,
        "shape": list(images.shape),
        "native": decoding.native,
        "skipped": decoding.skipped,
        "changed": decoding.changed,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        free = shutil.disk_usage(path.parent).free
        if free < images.nbytes:
            raise OSError(f"{images.nbytes / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
        described.write_text(json.dumps(meta), encoding="utf-8")
        os.replace(described, path.with_suffix(".json"))
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, np.lib.format.header_data_from_array_1_0(images)
            )
            flat = np.ascontiguousarray(images).reshape(-1).data
            for start in range(0, len(flat), _BLOCK):
                file.write(flat[start : start + _BLOCK])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return dataclasses.replace(decoding, images=np.load(path, mmap_mode="r"))
    except OSError as error:
        log.warning(
            "Decoded images cannot be kept in %s (%s); going on with them in memory. Another "
            "cache_dir would save decoding them each time",
            path.parent,
            error,
        )
        return decoding
    finally:
        for leftover in (temporary, described):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _remove_stale(where: pathlib.Path) -> None:
    """Remove what writers killed long ago left behind."""
    for leftover in where.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()

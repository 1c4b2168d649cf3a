"""Decode every image once, into one uint8 array, kept on disk and keyed by content."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
import PIL
from jaxtyping import UInt8

from mros_jax import parallel
from mros_jax.data import cache, decoding, fingerprint
from mros_jax.data.cache import Decoding
from mros_jax.data.datasets.layouts import BadFiles, OnBadImage
from mros_jax.data.images import Picture
from mros_jax.data.prefetch import prefetch
from mros_jax.data.splits import Split
from mros_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """All images of a split.

    Attributes:
        images: (N, H, W, 3) uint8 RGB; memory-mapped where the cache holds it.
        split: the split with exactly these images: without those that were skipped.
        fingerprint: of the split as it was given, see `fingerprint_split`.
        skipped: name -> why the image cannot be decoded.
        changed: name -> what was done to an image that is not upright 8-bit RGB.
    """

    images: UInt8[np.ndarray, "N H W 3"]
    split: Split
    fingerprint: str
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    changed: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int32 training labels of these images; None for query and gallery."""
        return self.split.labels


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the images of a store are during training.

    Attributes:
        kind: "device" (all images on every device) or "host".
        reason: one sentence with the numbers that decided it, for the log.
        data: `{"images": (N, H, W, 3), "labels": (N,)}` on the devices, or None.
        store: the store in host memory.
    """

    kind: Literal["device", "host"]
    reason: str
    data: dict[str, Any] | None
    store: ImageStore

    def batches(
        self, plan: np.ndarray, put: Callable[[dict[str, np.ndarray]], Any], *, depth: int = 2
    ) -> Iterator[Any]:
        """Yield what the training step gets, one item for each row of a plan.

        Args:
            plan: (steps, B) indices into the store.
            put: puts a batch on the devices, splitting its leading axis B over them.
            depth: batches made ahead in a thread (host memory only).

        Yields:
            `put({"indices": (B,)})` if the images are on the devices, where the step looks them up
            in `data`; otherwise `put({"images": (B, H, W, 3), "labels": (B,)})`, the same images.
        """
        if self.kind == "device":
            return (put({"indices": row}) for row in plan)
        images, labels = self.store.images, labels_of(self.store)

        def make(row: np.ndarray) -> Any:
            return put({"images": images[row], "labels": labels[row]})

        return prefetch(plan, make, depth=depth)


def load_store(
    split: Split,
    *,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    cache_dir: str | os.PathLike[str] | None = None,
    use_cache: bool = True,
    num_threads: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: bool = True,
) -> ImageStore:
    """Decode all images of a split, or find them in the cache.

    Images keep their size where they all share one (Market-1501: 128 x 64); otherwise each is
    resized to `height` x `width` by PIL, as the evaluation transform would.
    Images that are not upright 8-bit RGB are converted (see `decoding.decode_image`); the log
    counts them, and `ImageStore.changed` names them.

    The cache is one `.npy` file for each split, its name a hash of the encoded bytes of all images
    in order (of the parameters of rendered ones) and of the decoder: changing, adding or reordering
    files makes another file, renaming or touching them does not. It is written under a temporary
    name and renamed, so a killed writer leaves nothing that would be read. If it cannot be written
    (read-only, disk full), the log says so and the images stay in memory.

    In a run of several processes all must call this. Process 0 reads all images and writes the
    cache; where the others see that cache, they map it and read nothing else. Where they do not,
    each decodes a copy of the data set of its own.

    Args:
        split: the images.
        height: common height, where they differ in size.
        width: common width, where they differ in size.
        interpolation: of that resize, "bilinear" or "bicubic".
        cache_dir: where decoded images are kept; by default `mros_jax/images` in the user's cache
            directory ($XDG_CACHE_HOME, or ~/.cache).
        use_cache: read and write the cache at all.
        num_threads: decoding threads; by default one per CPU.
        on_bad_image: unreadable or truncated images: "error", or "skip" to leave them out; the log
            and `ImageStore.skipped` name them.
        progress: show a progress bar.

    Raises:
        UserError: unreadable images, named (`on_bad_image="error"`), no readable image, or a
            process whose data are others than those of process 0.
    """
    bad_files = BadFiles(on_bad_image)
    if height < 1 or width < 1:
        raise UserError(f"images of {height} x {width} pixels; both must be at least 1")
    directory = cache.directory(cache_dir)
    resized = f"{height}x{width}{'' if interpolation == 'bilinear' else f'-{interpolation}'}"
    reading: dict[str, Any] = {"num_threads": num_threads, "progress": progress}

    def locate(content: str, size: str) -> pathlib.Path:
        return directory / f"{_cache_key(content)}-{size}.npy"

    def find(content: str) -> Decoding | None:
        paths = [locate(content, size) for size in ("native", resized)]
        loaded = (cache.load(path, len(split)) for path in paths if use_cache)
        return next((entry for entry in loaded if entry is not None), None)

    def decode(content: str) -> Decoding:
        made = decode_split(split, height, width, interpolation, **reading)
        path = locate(content, "native" if made.native else resized)
        return cache.save(path, made) if use_cache else made

    found: Decoding | None = None

    def load_first() -> tuple[str, str]:
        nonlocal found
        content = split.images.digest(**reading)
        found = find(content) or decode(content)
        return content, fingerprint.combine(split, content)

    content, expected = parallel.from_main(load_first)

    def load_other() -> Decoding:
        mine = found or find(content)
        own = content if mine else split.images.digest(**reading)
        if fingerprint.combine(split, own) != expected:
            raise UserError(
                f"{split.name} split: the {len(split)} images that process {jax.process_index()} "
                "has are not those of process 0; give every process the same data set"
            )
        return mine or decode(content)

    found = parallel.run_on_all(load_other)
    names = [str(name) for name in split.names]
    skipped = {names[row]: reason for row, reason in found.skipped.items()}
    changed = {names[row]: changes for row, changes in found.changed.items()}
    described = [f"{name} ({reason})" for name, reason in skipped.items()]
    bad_files.report(f"{split.name} split", described, "cannot be decoded")
    if changed:
        log.warning("%s split: some images were converted: %s", split.name, count_changes(changed))
    if len(skipped) == len(split):
        raise UserError(f"{split.name} split: none of {len(split)} images can be decoded")
    kept = np.setdiff1d(np.arange(len(split)), np.array(list(found.skipped), np.int64))
    return ImageStore(
        images=found.images,
        split=split.select(kept) if skipped else split,
        fingerprint=expected,
        skipped=skipped,
        changed=changed,
    )


def _cache_key(content: str) -> str:
    """Name everything that decides the decoded pixels."""
    decoder = f"{content} decoder {decoding.VERSION} Pillow {PIL.__version__}"
    return hashlib.blake2b(decoder.encode(), digest_size=16).hexdigest()


def count_changes(changed: dict[str, tuple[str, ...]]) -> str:
    """Summarize what was done to images: "3 L to RGB, 1 16 bit scaled to 8"."""
    counts = collections.Counter(change for changes in changed.values() for change in changes)
    return ", ".join(f"{count} x {change}" for change, count in sorted(counts.items()))


def decode_split(
    split: Split,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    *,
    num_threads: int | None = None,
    progress: bool = False,
) -> Decoding:
    """Decode the images of a split into one array: in their own size, if they all share one."""
    native = _first_size(split) or (height, width)
    run = {"num_threads": num_threads, "progress": progress}
    try:
        return _decode_to(split, native, None, **run)
    except _OtherSizeError:
        return _decode_to(split, (height, width), interpolation, **run)


class _OtherSizeError(Exception):
    """An image is not of the size that the others share."""


def _first_size(split: Split) -> tuple[int, int] | None:
    """Find the size of the first image that can be read."""
    for row in range(len(split)):
        [picture] = split.images.select(np.array([row])).map(lambda picture: picture)
        if picture.pixels is not None:
            return picture.pixels.shape[:2]
    return None


def _decode_to(
    split: Split, shape: tuple[int, int], interpolation: str | None, **run: Any
) -> Decoding:
    """Decode everything into one array; raise at the first other size if not to be resized."""
    images = np.empty((len(split), *shape, 3), np.uint8)

    def copy(picture: Picture) -> tuple[str, tuple[str, ...], bool]:
        if picture.pixels is None:
            return picture.error, (), True
        if picture.pixels.shape[:2] == shape:
            images[picture.row] = picture.pixels
        elif interpolation is not None:
            images[picture.row] = decoding.resize(picture.pixels, *shape, interpolation)
        else:
            return "", picture.changes, False
        return "", picture.changes, True

    skipped, changed = {}, {}
    for row, (error, changes, fits) in enumerate(split.images.map(copy, **run)):
        if not fits:
            raise _OtherSizeError
        if error:
            skipped[row] = error
        if changes:
            changed[row] = changes
    if skipped:
        images = np.delete(images, list(skipped), axis=0)
    return Decoding(images, interpolation is None, skipped, changed)


def place(
    store: ImageStore,
    *,
    fraction: float = 0.5,
    replicate: Callable[[dict[str, np.ndarray]], dict[str, Any]],
) -> Placed:
    """Put a training store on every device if it fits there, or leave it in host memory.

    Args:
        store: a training store, with labels.
        fraction: the images may take up to this share of the memory of a device. 0 keeps them in
            host memory. A CPU does not tell its memory, and is taken to have an equal part of the
            machine's; of an accelerator that does not tell it, nothing is taken.
        replicate: puts a tree of arrays whole on each device, such as `parallel.replicate`.

    Raises:
        UserError: a fraction outside 0..1, or a store without labels.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"the share of device memory is {fraction}; it must be in 0..1")
    labels = labels_of(store)
    devices = jax.local_devices()
    memory = min(_memory(device, len(devices)) for device in devices)
    needed = store.images.nbytes
    fits = needed <= fraction * memory
    reason = (
        f"{len(store)} images take {needed / 1e6:.0f} MB, "
        f"{fraction:.0%} of {devices[0].platform} memory is {fraction * memory / 1e6:.0f} MB: "
        + ("on the devices" if fits else "in host memory, prefetched")
    )
    if not fits:
        return Placed("host", reason, None, store)
    return Placed("device", reason, replicate({"images": store.images, "labels": labels}), store)


def labels_of(store: ImageStore) -> np.ndarray:
    """Return the training labels, (N,) int32.

    Raises:
        UserError: the split is none to train on.
    """
    if store.labels is None:
        raise UserError(f"the {store.split.name} split has no training labels")
    return store.labels


def _memory(device: jax.Device, count: int) -> float:
    """Return the bytes of a device's memory, 0 where an accelerator does not tell them."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if device.platform != "cpu":
        return 0.0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count

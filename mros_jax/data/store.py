"""Decode every image once, into one uint8 array, kept on disk and keyed by content."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8

from mros_jax.data import cache, fingerprint
from mros_jax.data.datasets.layouts import OnBadImage, check_choice, report_bad
from mros_jax.data.datasets.splits import Split
from mros_jax.data.prefetch import prefetch


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """All images of a split.

    Attributes:
      images: (N, H, W, 3) uint8 RGB; memory-mapped where the cache holds it.
      kept: (N,) int64, row i is image `kept[i]` of the split that was loaded; all of them unless
        some were skipped. `split` is already reduced to them.
      split: the split with exactly these images.
      cached: the file that holds `images`, or None.
      fingerprint: of the split as it was given, see `fingerprint_split`.
    """

    images: UInt8[np.ndarray, "N H W 3"]
    kept: np.ndarray
    split: Split
    cached: pathlib.Path | None
    fingerprint: str

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
        """Yields what the training step gets, one item per row of a plan.

        Args:
          plan: (steps, B) indices into the store.
          put: puts a batch on the devices, splitting its leading axis B over them.
          depth: batches made ahead in a thread (host memory only).

        Yields:
          `put({"indices": (B,)})` if the images are on the devices, where the step looks them up in
          `data`; otherwise `put({"images": (B, H, W, 3), "labels": (B,)})`, the same images.
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
    cache_dir: str | os.PathLike[str] | None = None,
    use_cache: bool = True,
    on_cache_error: str = "warn",
    num_threads: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: bool = True,
) -> ImageStore:
    """Decodes all images of a split, or finds them in the cache.

    Images keep their size where they all share one (Market-1501: 128 x 64); otherwise each is
    resized to `height` x `width` by PIL's bilinear filter, as the evaluation transform would.
    Images that are not RGB (greyscale, CMYK, palette, 16 bit) are converted, and a warning counts
    them.

    The cache is one `.npy` file per split, its name a hash of the encoded bytes of all images in
    order (of `pixels_key` for rendered ones): changing, adding or reordering files makes another
    file, renaming or touching them does not. It is written under a temporary name and renamed, so a
    killed writer leaves nothing that would be read.

    Args:
      split: the images.
      height: common height, where they differ in size.
      width: common width, where they differ in size.
      cache_dir: where decoded images are kept; by default `mros_jax/images` in the user's cache
        directory ($XDG_CACHE_HOME, or ~/.cache).
      use_cache: read and write the cache at all.
      on_cache_error: if the cache cannot be written (read-only, disk full): "warn" and go on with
        the images in memory, or raise an "error".
      num_threads: decoding threads; by default one per CPU.
      on_bad_image: unreadable or truncated images: "error", or "skip" with a warning naming them.
      progress: show a progress bar.

    Raises:
      ValueError: unreadable images, named (`on_bad_image="error"`), or no readable image.
      OSError: the cache cannot be written (`on_cache_error="error"`).
    """
    if on_cache_error not in ("warn", "error"):
        raise ValueError(f"on_cache_error must be 'warn' or 'error', got {on_cache_error!r}")
    check_choice(on_bad_image)
    loader = _Loader(split, num_threads or os.cpu_count() or 1, progress)
    content = fingerprint.digest_images(split, num_threads=num_threads, progress=progress)
    unnamed = split.pixels is not None and split.pixels_key is None
    digest = content if use_cache and not unnamed else None
    directory = cache.directory(cache_dir)
    found = None
    if digest is not None:
        for stem in (f"{digest}-native", f"{digest}-{height}x{width}"):
            found = found or cache.load(directory / f"{stem}.npy")
    path = None
    if found is not None:
        path, images, meta = found
    else:
        images, meta = loader.decode(height, width)
        if digest is not None:
            stem = f"{digest}-{'native' if meta['native'] else f'{height}x{width}'}"
            saved = cache.save(directory / f"{stem}.npy", images, meta, on_cache_error)
            if saved is not None:
                path, images = directory / f"{stem}.npy", saved
    bad = {int(i): reason for i, reason in meta["bad"].items()}
    described = [f"{split.names[i]} ({reason})" for i, reason in bad.items()]
    report_bad(f"{split.name} split", described, "cannot be decoded", on_bad_image)
    if meta["converted"]:
        counts = ", ".join(f"{count} {mode}" for mode, count in sorted(meta["converted"].items()))
        warnings.warn(
            f"{split.name} split: some images are not 8-bit RGB and were converted: {counts}",
            stacklevel=2,
        )
    kept = np.setdiff1d(np.arange(len(split)), np.array(list(bad), np.int64))
    if not len(kept):
        raise ValueError(f"{split.name} split: none of {len(split)} images can be decoded")
    return ImageStore(
        images,
        kept,
        split.select(kept) if bad else split,
        path,
        fingerprint.combine(split, content),
    )


def place(
    store: ImageStore,
    *,
    fraction: float | int = 0.5,
    devices: Sequence[jax.Device] | None = None,
    replicate: Callable[[dict[str, np.ndarray]], dict[str, Any]] | None = None,
) -> Placed:
    """Puts a training store on every device if it fits there, or leaves it in host memory.

    Args:
      store: a training store, with labels.
      fraction: the images may take up to this share of the memory of a device. 0 keeps them in host
        memory. A device that does not tell its memory (a CPU) is taken to have an equal part of the
        machine's.
      devices: this process's devices; by default all of them.
      replicate: puts a tree of arrays whole on each device; by default with a replicated sharding.

    Raises:
      ValueError: a fraction outside 0..1, or a store without labels.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the share of device memory must be in 0..1, got {fraction}")
    labels = labels_of(store)
    devices = list(devices or jax.local_devices())
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
    if replicate is None:
        sharding = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())

        def replicate(tree: dict[str, np.ndarray]) -> dict[str, Any]:
            return {name: jax.device_put(array, sharding) for name, array in tree.items()}

    return Placed("device", reason, replicate({"images": store.images, "labels": labels}), store)


def labels_of(store: ImageStore) -> np.ndarray:
    """The training labels, (N,) int32.

    Raises:
      UserError: the split is none to train on.
    """
    if store.labels is None:
        raise ValueError(f"the {store.split.name} split has no training labels")
    return store.labels


def _memory(device: jax.Device, count: int) -> float:
    """Returns the bytes of a device's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count


def decode_image(data: bytes) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """Decodes one image.

    Args:
      data: an encoded image in any format that PIL reads.

    Returns:
      RGB grey levels (H, W, 3) uint8, and the mode the file has in PIL's terms ("RGB", "L", ...).
      16-bit grey levels are scaled to 8 bit; transparency is dropped.

    Raises:
      OSError: truncated, or not an image (also as PIL's other exceptions for broken files).
    """
    with PIL.Image.open(io.BytesIO(data)) as file:
        mode = file.mode
        if file.format == "PNG" and data[24] == 16 and mode == "RGB":
            mode = "RGB;16"  # PIL keeps the upper 8 bits without saying so
        file.load()
        image: PIL.Image.Image = file
        if mode.startswith("I"):
            # PIL would clip 16-bit levels at 255 instead of scaling them.
            levels = (np.asarray(file).astype(np.int64) * 255 + 32767) // 65535
            image = PIL.Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
        elif mode == "P" or "transparency" in file.info:
            image = file.convert("RGBA")
        return np.asarray(image.convert("RGB")), mode


class _Loader:
    """Reads, hashes and decodes the images of one split in threads."""

    def __init__(self, split: Split, threads: int, progress: bool):
        self.split, self.threads, self.progress = split, threads, progress

    def _each(self, task: Callable[[int], Any], what: str) -> Iterable[Any]:
        """Yields `task(i)` for every image, in order, with a progress bar."""
        text = f"{what} {self.split.name}"
        return fingerprint.run_threaded(task, len(self.split), text, self.threads, self.progress)

    def decode(
        self, height: int, width: int
    ) -> tuple[UInt8[np.ndarray, "N H W 3"], dict[str, Any]]:
        """Returns the images that can be decoded, and what was met on the way."""
        if self.split.pixels is not None:
            return self.split.pixels(), {"native": True, "bad": {}, "converted": {}}
        native = self._decode_to(self._first_size(height, width), resize=False)
        if native is not None:
            return native[0], {"native": True, **native[1]}
        resized = self._decode_to((height, width), resize=True)
        assert resized is not None
        return resized[0], {"native": False, **resized[1]}

    def _first_size(self, height: int, width: int) -> tuple[int, int]:
        for i in range(len(self.split)):
            try:
                return decode_image(self.split.read(i))[0].shape[:2]
            except Exception:  # decoding all of them reports it
                continue
        return height, width

    def _decode_to(
        self, shape: tuple[int, int], *, resize: bool
    ) -> tuple[UInt8[np.ndarray, "N H W 3"], dict[str, Any]] | None:
        """Decodes everything into one array; None at the first other size if not to be resized."""
        images = np.empty((len(self.split), *shape, 3), np.uint8)
        bad: dict[int, str] = {}
        converted: collections.Counter[str] = collections.Counter()
        other_size = threading.Event()

        def decode(i: int) -> str | Exception:
            if other_size.is_set():
                return ""
            try:
                pixels, mode = decode_image(self.split.read(i))
            except Exception as error:  # PIL raises what it likes on broken files
                return error
            if pixels.shape[:2] != shape:
                if not resize:
                    other_size.set()
                    return ""
                image = PIL.Image.fromarray(pixels)
                pixels = np.asarray(image.resize(shape[::-1], PIL.Image.Resampling.BILINEAR))
            images[i] = pixels
            return mode

        for i, result in enumerate(self._each(decode, "decoding")):
            if isinstance(result, Exception):
                bad[i] = f"{type(result).__name__}: {result}"
            elif result != "RGB":
                converted[result] += 1
        if other_size.is_set():
            return None
        if bad:
            images = np.delete(images, list(bad), axis=0)
        return images, {"bad": bad, "converted": dict(converted)}

"""The images of a split: encoded files or records, or pictures that are rendered when asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from mros_jax import console
from mros_jax.data.decoding import Decoded, UnreadableImageError, decode_image
from mros_jax.data.prefetch import prefetch
from mros_jax.errors import UserError

_CHUNK = 64  # images a thread takes at a time
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of a split, read.

    Attributes:
        row: its place in the split.
        digest: of its encoded bytes (of its pixels, if rendered): equal for the same image.
        pixels: RGB grey levels; None if it cannot be read.
        changes: what decoding had to do to it, see `Decoded`.
        error: why it cannot be read.
    """

    row: int
    digest: bytes
    pixels: UInt8[np.ndarray, "H W 3"] | None
    changes: tuple[str, ...] = ()
    error: str = ""

    def require(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the pixels.

        Raises:
            UnreadableImageError: there are none.
        """
        if self.pixels is None:
            raise UnreadableImageError(f"{self.row} of the split", self.error)
        return self.pixels


@runtime_checkable
class Images(Protocol):
    """The images of a split, in its order."""

    def __len__(self) -> int: ...

    def select(self, rows: np.ndarray) -> Images:
        """Return these images only, in this order."""
        ...

    def encoded(self, row: int) -> bytes:
        """Return an image as a file: its own bytes, or a PNG if it is rendered."""
        ...

    def digest(self, *, num_threads: int | None = None, progress: bool = False) -> str:
        """Compute a digest of what decides the pixels of all images, in order."""
        ...

    def map(
        self,
        task: Callable[[Picture], T],
        *,
        num_threads: int | None = None,
        progress: bool = False,
    ) -> Iterator[T]:
        """Yield `task(picture)` for every image, in order, from several threads."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Images in files or records.

    Attributes:
        read: `read(row)` returns the encoded bytes as they are on disk; called by several threads.
        count: how many images there are.
        claimed: the digest that they must have, where it is known; None where it is not.
    """

    read: Callable[[int], bytes]
    count: int
    claimed: str | None = None

    def __len__(self) -> int:
        return self.count

    def select(self, rows: np.ndarray) -> EncodedImages:
        """See `Images`."""
        places, read = rows.tolist(), self.read
        return EncodedImages(lambda row: read(places[row]), len(places))

    def encoded(self, row: int) -> bytes:
        """See `Images`."""
        return self.read(int(row))

    def digest(self, *, num_threads: int | None = None, progress: bool = False) -> str:
        """See `Images`; unreadable files count as such.

        Raises:
            UserError: it is not the one claimed.
        """
        total = ContentDigest()
        for part in run_threaded(self._hash, self.count, "checking", num_threads, progress):
            total.update(part)
        digest = total.hexdigest()
        if self.claimed is not None and digest != self.claimed:
            raise UserError(
                f"the images' bytes are not those that were stored (their digest is {digest}, "
                f"{self.claimed} was stored): the records are damaged; prepare them again"
            )
        return digest

    def _hash(self, row: int) -> bytes:
        try:
            return hash_bytes(self.read(row))
        except Exception:  # decoding meets it again and reports it
            return b"unreadable"

    def map(
        self,
        task: Callable[[Picture], T],
        *,
        num_threads: int | None = None,
        progress: bool = False,
    ) -> Iterator[T]:
        """See `Images`."""

        def read(row: int) -> T:
            return task(self._picture(row))

        return run_threaded(read, self.count, "decoding", num_threads, progress)

    def _picture(self, row: int) -> Picture:
        data = b""
        try:
            data = self.read(row)
            decoded: Decoded = decode_image(data)
        except UnreadableImageError as error:
            return Picture(row, hash_bytes(data), None, error=error.reason)
        except Exception as error:  # files raise OSError, records many types
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            return Picture(row, b"", None, error=reason)
        return Picture(row, hash_bytes(data), decoded.pixels, decoded.changes)


class ContentDigest:
    """A digest over the digests of images, in their order."""

    def __init__(self) -> None:
        self._total = hashlib.blake2b(digest_size=16)

    def update(self, image: bytes) -> None:
        """Add the digest of the next image."""
        self._total.update(len(image).to_bytes(1, "little") + image)

    def hexdigest(self) -> str:
        """Return 32 hexadecimal digits."""
        return self._total.hexdigest()


def hash_bytes(data: bytes) -> bytes:
    """Compute the digest of one image's bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def run_threaded(
    task: Callable[[int], T], count: int, what: str, num_threads: int | None, progress: bool
) -> Iterator[T]:
    """Yield `task(i)` for i in 0..count-1, in order, from threads, with a progress bar."""

    def chunk(start: int) -> list[T]:
        return [task(i) for i in range(start, min(start + _CHUNK, count))]

    threads = num_threads or os.cpu_count() or 1
    chunks = prefetch(range(0, count, _CHUNK), chunk, depth=4 * threads, num_threads=threads)
    with console.progress(total=count, desc=what, unit=" images", disable=not progress) as bar:
        for results in chunks:
            yield from results
            bar.update(len(results))

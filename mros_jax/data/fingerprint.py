"""What a split holds, as one short text: results are known by it, never by a name or a place."""

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from mros_jax.data.datasets.splits import Split

_CHUNK = 64  # images a thread takes at a time
T = TypeVar("T")


def fingerprint_split(
    split: Split, *, num_threads: int | None = None, progress: bool = False
) -> str:
    """Compute a digest of everything that a split holds, in its order.

    It covers names, pids, camids, sequences, training labels, and the encoded bytes of each image
    (for rendered images what they are rendered from). It does not depend on where the files lie, or
    on whether they were read from a directory or from prepared records. Take it of a split as
    listed, before unreadable images are left out: repairing one changes it.

    Args:
        split: the split.
        num_threads: reading threads; by default one per CPU.
        progress: show a progress bar.

    Returns:
        32 hexadecimal digits.
    """
    return combine(split, digest_images(split, num_threads=num_threads, progress=progress))


def digest_images(split: Split, *, num_threads: int | None = None, progress: bool = False) -> str:
    """Compute a digest of the images alone, in their order: what decides the decoded pixels."""
    total = hashlib.blake2b(digest_size=16)
    if split.pixels is not None:
        if split.pixels_key is None:
            total.update(b"pixels:" + np.ascontiguousarray(split.pixels()).tobytes())
        else:
            total.update(b"rendered:" + split.pixels_key.encode())
        return total.hexdigest()

    def digest(i: int) -> bytes:
        try:
            return hashlib.blake2b(split.read(i), digest_size=16).digest()
        except OSError:  # decoding meets it again and reports it
            return b"unreadable"

    for part in run_threaded(digest, len(split), f"checking {split.name}", num_threads, progress):
        total.update(part)
    return total.hexdigest()


def combine(split: Split, images: str) -> str:
    """Compute the fingerprint of a split from the digest of its images."""
    total = hashlib.blake2b(digest_size=16)
    for text in (split.name, images, *split.names.tolist()):
        data = text.encode("utf-8", "surrogateescape")
        total.update(len(data).to_bytes(8, "little") + data)
    for column in (split.pids, split.camids, split.sequences, split.labels):
        total.update(b"none" if column is None else column.astype("<i8").tobytes())
    return total.hexdigest()


def run_threaded(
    task: Callable[[int], T], count: int, what: str, num_threads: int | None, progress: bool
) -> Iterator[T]:
    """Yield `task(i)` for i in 0..count-1, in order, from threads, with a progress bar."""

    def chunk(start: int) -> list[T]:
        return [task(i) for i in range(start, min(start + _CHUNK, count))]

    disable = None if progress else True
    with (
        tqdm(total=count, desc=what, unit=" images", disable=disable) as bar,
        concurrent.futures.ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool,
    ):
        for results in pool.map(chunk, range(0, count, _CHUNK)):
            yield from results
            bar.update(len(results))

"""The nearest images of every image in a processor's memory, in half the products.

Similarities are symmetric: those of one tile of images to another serve the lists of both. Lists
begin with the nearest images of the own tile; of all others few are near enough to enter a list,
and only those are looked at one by one.
"""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Int64

from mros_jax import parallel
from mros_jax.retrieval import blocks, distances

SIZE = 1024  # images in a tile, at most: its similarities stay in a core's cache
_WHOLE = 2**32 - 1


def encode(
    similarity: Float32[np.ndarray, "*P"], index: Int[np.ndarray, "*P"]
) -> Int64[np.ndarray, "*P"]:
    """Numbers that order images: the larger the more alike, or else the lower the index."""
    bits = (similarity + np.float32(0)).view(np.int32)  # -0 becomes 0
    bits ^= (bits >> 31) & np.int32(2**31 - 1)  # negative numbers in their order
    keys: np.ndarray = (bits.astype(np.int64) << 32) | (_WHOLE - index)
    return keys


def decode(
    keys: Int64[np.ndarray, "*P"],
) -> tuple[Float32[np.ndarray, "*P"], Int32[np.ndarray, "*P"]]:
    """Similarities and indices, from `encode`."""
    bits = (keys >> 32).astype(np.int32)
    bits ^= (bits >> 31) & np.int32(2**31 - 1)
    return bits.view(np.float32), (_WHOLE - (keys & _WHOLE)).astype(np.int32)


class Lists:
    """The k nearest images so far of each image of a tile.

    Attributes:
        keys: (T, k) encoded, the nearest first; at the start all are infinitely far.
        least: (T,) similarity of the last in each list: images below cannot enter it.
    """

    def __init__(self, num: int, k: int):
        far = np.full((num, k), -np.inf, np.float32)
        self.keys = encode(far, np.zeros(far.shape, np.int64))
        self.least = far[:, 0]
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def begin(self, similarity: Float32[np.ndarray, "T T"], first: int) -> None:
        """Fill the lists with images of the tile, whose indices begin at `first`, itself first."""
        num, k = self.keys.shape
        similarity = similarity.copy()
        np.fill_diagonal(similarity, np.inf)
        if k < num:
            # The largest of every so many: k images are at least as near as the k-th of these.
            size = math.isqrt(num // k)
            groups = num // size
            largest = similarity[:, : size * groups].reshape(num, size, groups).max(1)
            self.least = np.partition(largest, groups - k, axis=1)[:, groups - k]
        row, column = np.nonzero(similarity >= self.least[:, None])
        self.add(row, first + column, similarity[row, column])
        self.merge()

    def add(
        self,
        row: Int[np.ndarray, "P"],
        index: Int[np.ndarray, "P"],
        similarity: Float32[np.ndarray, "P"],
    ) -> None:
        """Note images for lists of some rows; lists are made anew when there are many of them."""
        self._waiting.append((row.astype(np.uint16), encode(similarity, index)))
        self._count += len(row)
        if self._count > self.keys.size:
            self.merge()

    def merge(self) -> None:
        """Bring the lists up to date."""
        if not self._count:
            return
        row, keys = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        order = np.argsort(row, kind="stable")  # 16 bits: no comparisons
        row, keys = row[order], keys[order]
        lengths = np.bincount(row, minlength=len(self.keys))
        position = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        num, k = self.keys.shape
        table = np.full((num, k + lengths.max()), np.iinfo(np.int64).min)
        table[:, :k] = self.keys
        table[row, k + position] = keys
        table.sort(axis=1)
        self.set(np.ascontiguousarray(table[:, : -k - 1 : -1]))

    def set(self, keys: Int64[np.ndarray, "T k"]) -> None:
        """Take other lists in place of these."""
        self.keys = keys
        self.least = decode(keys[:, -1])[0]


@jax.jit
def _sift(
    similarity: Float[Array, "T T"], row_least: Float[Array, "T"], column_least: Float[Array, "T"]
) -> tuple[Bool[Array, "T T"], Float[Array, "T"], Float[Array, "T"]]:
    """Which pairs may enter the list of either, and the least similarity in rows and columns."""
    near = similarity >= jnp.minimum(row_least[:, None], column_least)
    return near, similarity.min(1), similarity.min(0)


_compare = jax.jit(distances.compute_similarity)
_norms = jax.jit(distances.KINDS["similarity"].norms)


class Tiles:
    """Descriptors cut into tiles of equally many rows, the last one padded, on every device.

    Args:
        features: (N, D), checked.
        size: rows of a tile.
        devices: they take pairs of tiles in turns.
    """

    def __init__(
        self, features: Float32[np.ndarray, "N D"], size: int, devices: Sequence[jax.Device]
    ):
        cut = [blocks.pad_rows(features[i : i + size], size) for i in range(0, len(features), size)]
        self._parts = [[jax.device_put(tile, device) for tile in cut] for device in devices]
        self._norms = [[_norms(tile) for tile in parts] for parts in self._parts]

    def compare(
        self, pairs: Sequence[tuple[int, int]], lists: Sequence[Lists]
    ) -> Iterator[tuple[int, int, Any]]:
        """For each pair of tiles their similarities, and what `_sift` makes of them."""
        waiting: collections.deque[tuple[int, int, Any]] = collections.deque()
        size = len(self._parts[0][0])
        for number, (i, j) in enumerate(pairs):
            device = number % len(self._parts)
            parts = self._parts[device]
            similarity = _compare(parts[i], parts[j], self._norms[device][j])
            least = (blocks.pad_rows(lists[tile].least, size) for tile in (i, j))
            waiting.append((i, j, (similarity, *_sift(similarity, *least))))
            if len(waiting) > len(self._parts):  # the next ones are being computed
                yield *waiting[0][:2], jax.device_get(waiting.popleft()[2])
        for i, j, found in waiting:
            yield i, j, jax.device_get(found)


def search(
    features: Float32[np.ndarray, "N D"], k: int, placement: blocks.Placement
) -> tuple[Int32[np.ndarray, "N k"], Float32[np.ndarray, "N k"], Float32[np.ndarray, "N"]]:
    """Nearest images of each image by cosine, itself first: see `neighbors.Neighbors`.

    Processes that work together share the pairs of tiles.
    """
    num = len(features)
    size = min(placement.block_size or SIZE, SIZE)
    size = -(-num // (-(-num // size) * 16)) * 16  # as even as can be
    firsts = range(0, num, size)
    tiles = range(len(firsts))
    others = [(i, j) for i in tiles for j in tiles[i + 1 :]]
    lists = [Lists(min(size, num - first), k) for first in firsts]
    smallest = np.full((len(tiles), size), np.inf, np.float32)
    cut = Tiles(features, size, placement.list_devices())

    def begin(own: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        for i, _, (similarity, _, least, _) in cut.compare([(i, i) for i in own], lists):
            inside = len(lists[i].keys)
            lists[i].begin(similarity[:inside, :inside], firsts[i])
            smallest[i] = least  # padding repeats an image
        return [(lists[i].keys, smallest[i]) for i in own]

    def enter(pairs: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Bring pairs into the lists; returns all lists for the first pair, nothing for others."""
        for i, j, (similarity, near, of_rows, of_columns) in cut.compare(pairs, lists):
            own, their = lists[i], lists[j]
            np.minimum(smallest[i], of_rows, out=smallest[i])
            np.minimum(smallest[j], of_columns, out=smallest[j])
            near = near[: len(own.keys), : len(their.keys)]
            row, column = np.divmod(np.flatnonzero(near), near.shape[1])
            value = similarity[row, column]
            for chosen, to, line, index in (
                (value >= own.least[row], own, row, firsts[j] + column),
                (value >= their.least[column], their, column, firsts[i] + row),
            ):
                to.add(line[chosen], index[chosen], value[chosen])
        for each in lists:
            each.merge()
        return [(collect(), smallest), *[None] * (len(pairs) - 1)][: len(pairs)]

    def collect() -> np.ndarray:
        return np.concatenate([each.keys for each in lists])

    if placement.together:
        for each, line, (keys, least) in zip(
            lists, smallest, parallel.share(tiles, begin), strict=True
        ):
            each.set(keys)
            line[:] = least
        begun = collect()
        found = [found for found in parallel.share(others, enter) if found is not None]
        keys = _join(begun, [keys for keys, _ in found], size)
        smallest = np.min([smallest, *(least for _, least in found)], axis=0)
    else:
        begin(tiles)
        enter(others)
        keys = collect()
    similarity, indices = decode(keys)
    return indices, np.minimum(similarity, 1), smallest.reshape(-1)[:num]


def _join(
    begun: Int64[np.ndarray, "N k"], found: Sequence[Int64[np.ndarray, "N k"]], size: int
) -> Int64[np.ndarray, "N k"]:
    """Lists from how all processes began them and from those that each has in the end."""
    tile = np.arange(len(begun))[:, None] // size
    parts = [begun]
    for keys in found:  # what all began with counts once
        parts.append(np.where(decode(keys)[1] // size == tile, np.iinfo(np.int64).min, keys))
    joined = np.concatenate(parts, axis=1)
    joined.sort(axis=1)
    return np.ascontiguousarray(joined[:, : -begun.shape[1] - 1 : -1])

"""The nearest images of every image: exact, in blocks, without an N x N matrix."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from mros_jax.retrieval import blocks, distances
from mros_jax.retrieval.inputs import Numbers


class Neighbors(NamedTuple):
    """Nearest images of each image by cosine, itself first.

    Attributes:
        indices: (N, k) by falling similarity; equal ones by index.
        similarity: (N, k) cosines (of the image with itself: 1); None where lists were given.
        smallest: (N,) cosine with the farthest image; None where lists were given.
    """

    indices: Int32[np.ndarray, "N k"]
    similarity: Float32[np.ndarray, "N k"] | None
    smallest: Float32[np.ndarray, "N"] | None


def select_top(
    values: Float[Array, "B N"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The k largest of each row and where they are, equal ones by index.

    Only the k groups of neighbouring columns with the largest maxima can hold one of the k largest,
    so two small selections replace one of the whole row.
    """
    num = values.shape[1]
    size = max(1, math.isqrt(num // k))
    groups = -(-num // size)
    if size == 1 or groups <= k:
        top, indices = jax.lax.top_k(values, k)
        return top, indices
    padded = jnp.pad(values, ((0, 0), (0, groups * size - num)), constant_values=-jnp.inf)
    padded = padded.reshape(-1, groups, size)  # (B, groups, size)
    _, best = jax.lax.top_k(padded.max(2), k)
    best = jnp.sort(best, axis=1)  # by index, so that the second selection keeps the order of ties
    members = jnp.take_along_axis(padded, best[:, :, None], axis=1)  # (B, k, size)
    top, position = jax.lax.top_k(members.reshape(len(values), -1), k)
    group = jnp.take_along_axis(best, position // size, axis=1)
    return top, group * size + position % size


def _place(features: Any, devices: Sequence[jax.Device] | None) -> list[Array]:
    return distances.place_gallery(features, "similarity", devices)


@functools.cache
def _make_look(k: int) -> Callable:
    def look(similarity: Float[Array, "B N"], index: Int[Array, "B"]) -> tuple[Array, Array, Array]:
        smallest = similarity.min(1)
        similarity = similarity.at[jnp.arange(len(index)), index].set(jnp.inf)
        top, indices = select_top(similarity, k)
        return indices, jnp.minimum(top, 1.0), smallest

    return look


def search_neighbors(
    features: Float32[np.ndarray | Array, "N D"],
    k: int,
    *,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Neighbors:
    """Find the k nearest images (itself included, and first) of every image by cosine.

    Args:
        features: (N, D), checked, of any norm but zero.
        k: length of the lists, at most N.
        block_size: images in a block on one device.
        devices: default all local devices.
    """
    num = len(features)
    mapped = blocks.BlockMap(
        distances.compute_similarity, _place(features, devices), look=_make_look(k), devices=devices
    )
    indices, similarity = np.empty((num, k), np.int32), np.empty((num, k), np.float32)
    smallest = np.empty(num, np.float32)

    def get(rows: slice) -> tuple[Any, Any]:
        return features[rows], np.arange(rows.start, rows.stop, dtype=np.int32)

    for rows, block in mapped.run(
        num, num, get, num_features=features.shape[1], block_size=block_size
    ):
        indices[rows], similarity[rows], smallest[rows] = block
    return Neighbors(indices, similarity, smallest)


@functools.cache
def _make_select(k: int) -> Callable:
    return lambda similarity: select_top(similarity, k)[1]


def search_gallery(
    query: Float32[np.ndarray | Array, "Q D"],
    gallery: Float32[np.ndarray | Array, "G D"],
    k: int,
    *,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Int32[np.ndarray, "Q k"]:
    """The k gallery images nearest to each query by cosine, nearest first."""
    mapped = blocks.BlockMap(
        distances.compute_similarity,
        _place(gallery, devices),
        look=_make_select(k),
        devices=devices,
    )
    result = np.empty((len(query), k), np.int32)
    for rows, block in mapped.run(
        len(query),
        len(gallery),
        lambda rows: (query[rows],),
        num_features=query.shape[1],
        block_size=block_size,
    ):
        result[rows] = block
    return result


def _smallest(
    query: Float[Array, "B D"], features: Float[Array, "N D"], norms: Float[Array, "N"]
) -> Float[Array, "B"]:
    return distances.compute_similarity(query, features, norms).min(1)


def find_farthest(
    features: Float32[np.ndarray | Array, "N D"],
    *,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Float32[np.ndarray, "N"]:
    """Cosine of each image with the farthest one."""
    mapped = blocks.BlockMap(_smallest, _place(features, devices), devices=devices)
    num = len(features)
    result = np.empty(num, np.float32)
    for rows, block in mapped.run(
        num,
        num,
        lambda rows: (features[rows],),
        num_features=features.shape[1],
        block_size=block_size,
    ):
        result[rows] = block
    return result


def stack(
    query: Float32[np.ndarray | Array, "Q D"], gallery: Float32[np.ndarray | Array, "G D"]
) -> Float32[np.ndarray | Array, "N D"]:
    """Queries above gallery; on a CPU, JAX then uses this copy as it is."""
    if isinstance(query, jax.Array) or isinstance(gallery, jax.Array):
        return jnp.concatenate([query, gallery])
    out = blocks.empty_aligned((len(query) + len(gallery), query.shape[1]))
    return np.concatenate([query, gallery], out=out)


def search_faiss(
    features: Float32[np.ndarray | Array, "N D"], k: int, *, factory: str = "Flat", nprobe: int = 16
) -> Int32[np.ndarray, "N k"]:
    """The k nearest images of every image by cosine, found by faiss.

    For galleries where the exact search takes too long: `factory="IVF4096,Flat"` looks at `nprobe`
    of 4,096 clusters only. faiss searches a normalised copy of the features, on the CPU.

    Args:
        features: (N, D), checked.
        k: length of the lists.
        factory: faiss's description of an index; "Flat" is exact.
        nprobe: clusters that are searched, for indexes that have them.

    Raises:
        ImportError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "neighbors='faiss' needs faiss, which is not installed: pip install 'mros_jax[faiss]'"
        ) from error
    unit = np.array(features, np.float32, order="C")
    faiss.normalize_L2(unit)
    index = faiss.index_factory(unit.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(unit)
    index.add(unit)
    if hasattr(index, "nprobe"):
        index.nprobe = nprobe
    return index.search(unit, k)[1].astype(np.int32)


def check_neighbors(neighbors: Numbers, num: int, least: int) -> Int32[np.ndarray, "N k"]:
    """Return lists from outside with each image itself first, cut or kept as long as they are.

    Args:
        neighbors: (N, k) indices into queries and gallery stacked, nearest first.
        num: N.
        least: how long they must be.

    Raises:
        ValueError: another shape or type, too short, indices out of range or twice in a list.
    """
    lists = np.asarray(neighbors)
    if lists.ndim != 2 or lists.dtype.kind not in "iu" or len(lists) != num:
        raise ValueError(
            f"neighbors has shape {lists.shape} and type {lists.dtype}; expected whole numbers of "
            f"shape ({num}, k): one list for each query, then for each gallery image"
        )
    if lists.shape[1] < least:
        raise ValueError(
            f"neighbors has lists of {lists.shape[1]}; these parameters need at least {least} "
            "(the image itself counts as one)"
        )
    if lists.min() < 0 or lists.max() >= num:
        raise ValueError(
            f"neighbors holds indices {lists.min()}..{lists.max()}; expected 0..{num - 1} (an "
            "approximate search that found too few puts -1)"
        )
    lists = lists.astype(np.int32)
    ordered = np.sort(lists, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if twice.any():
        raise ValueError(f"neighbors lists an image twice, e.g. in row {np.argmax(twice)}")
    itself = np.arange(num, dtype=np.int32)[:, None]
    # With duplicates a search may put another image first; one that it left out replaces the last.
    found = lists == itself
    key = np.where(found, -1, np.arange(lists.shape[1]))
    missing = ~found.any(1)
    key[missing, -1] = -1
    lists[missing, -1] = itself[missing, 0]
    return np.take_along_axis(lists, np.argsort(key, axis=1, kind="stable"), axis=1)

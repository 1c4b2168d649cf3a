"""The nearest images of every image: exact, in blocks, without an N x N matrix."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32

from mros_jax import extras, parallel
from mros_jax.errors import UserError
from mros_jax.retrieval import blocks, distances, tiles
from mros_jax.retrieval.inputs import Numbers

MOST_POINTS = 64  # at most, that faiss finds a cluster from; with its own 256 it takes longer
_FAISS_BLOCK = 1024  # queries that a process gives to faiss at once, where several search


class Neighbors(NamedTuple):
    """Nearest images of each image by cosine, itself first.

    Attributes:
        indices: (N, k) by falling similarity; equal ones by index.
        similarity: (N, k) cosines (of the image with itself: 1).
        smallest: (N,) cosine with the farthest image.
    """

    indices: Int32[np.ndarray, "N k"]
    similarity: Float32[np.ndarray, "N k"]
    smallest: Float32[np.ndarray, "N"]


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


@functools.cache
def make_look(k: int) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
    """What finds the k nearest images in a block of similarities, and the farthest."""

    def look(similarity: Float[Array, "B N"], index: Int[Array, "B"]) -> tuple[Array, Array, Array]:
        smallest = similarity.min(1)
        similarity = similarity.at[jnp.arange(len(index)), index].set(jnp.inf)
        top, indices = select_top(similarity, k)
        return indices, jnp.minimum(top, 1.0), smallest

    return look


def search_neighbors(
    features: Float32[np.ndarray | Array, "N D"],
    k: int,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Neighbors:
    """Find the k nearest images (itself included, and first) of every image by cosine.

    Args:
        features: (N, D), checked, of any norm but zero.
        k: length of the lists, at most N.
        placement: devices and block size.
    """
    if placement.is_host():
        return Neighbors(*tiles.search(np.asarray(features), k, placement))
    return search_blocks(features, k, placement)


def search_blocks(
    features: Float32[np.ndarray | Array, "N D"],
    k: int,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Neighbors:
    """`search_neighbors` where only lists leave the devices: each block has all similarities."""
    search = distances.Gallery(features, "similarity", look=make_look(k), placement=placement)
    return Neighbors(*search(features, np.arange(len(features), dtype=np.int32)))


@functools.cache
def _make_select(k: int) -> Callable[[Array], Array]:
    return lambda similarity: select_top(similarity, k)[1]


def search_gallery(
    query: Float32[np.ndarray | Array, "Q D"],
    gallery: Float32[np.ndarray | Array, "G D"],
    k: int,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Int32[np.ndarray, "Q k"]:
    """The k gallery images nearest to each query by cosine, nearest first."""
    search = distances.Gallery(gallery, "similarity", look=_make_select(k), placement=placement)
    nearest: np.ndarray = search(query)
    return nearest


def _smallest(similarity: Float[Array, "B N"]) -> Float[Array, "B"]:
    return similarity.min(1)


def describe_neighbors(
    features: Float32[np.ndarray | Array, "N D"],
    lists: Int32[np.ndarray, "N k"],
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Neighbors:
    """Lists from another search, with the cosines that the exact search finds on its way."""
    row = np.repeat(np.arange(len(lists)), lists.shape[1])
    similarity = compute_cosines(features, row, lists.ravel()).reshape(lists.shape)
    farthest = distances.Gallery(features, "similarity", look=_smallest, placement=placement)
    return Neighbors(lists, similarity.astype(np.float32), farthest(features))


def compute_cosines(
    features: Float32[np.ndarray | Array, "N D"],
    row: Int[np.ndarray, "P"],
    column: Int[np.ndarray, "P"],
) -> Float64[np.ndarray, "P"]:
    """Cosine of each pair of images (row, column)."""
    features = np.asarray(features)
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    result = np.empty(len(row))
    step = max(1, 2**18 // features.shape[1])  # two gathers of at most 1 MiB, a core's cache
    for start in range(0, len(row), step):
        i, j = row[start : start + step], column[start : start + step]
        product = np.einsum("pd,pd->p", features[i], features[j])
        result[start : start + step] = product / (norms[i] * norms[j])
    return result


def stack(
    query: Float32[np.ndarray | Array, "Q D"], gallery: Float32[np.ndarray | Array, "G D"]
) -> Float32[np.ndarray | Array, "N D"]:
    """Queries above gallery; on a CPU, JAX then uses this copy as it is."""
    if isinstance(query, jax.Array) or isinstance(gallery, jax.Array):
        return jnp.concatenate([query, gallery])
    return blocks.concatenate([query, gallery])


def check_search(neighbors: str) -> None:
    """Raise a UserError unless a search has this name and can be used: "exact" or "faiss...".

    See `search_faiss` for what may follow "faiss".
    """
    name, *rest = neighbors.split(":")
    if neighbors != "exact" and (name != "faiss" or len(rest) > 2):
        raise UserError(
            f"neighbors is {neighbors!r}; expected 'exact', 'faiss', 'faiss:INDEX' or "
            "'faiss:INDEX:PARAMETERS', as in 'faiss:IVF1024,Flat:nprobe=32'"
        )
    if name == "faiss":
        _import_faiss()


def _import_faiss() -> Any:
    extras.require("faiss", "neighbors='faiss'")
    import faiss

    return faiss


def search_faiss(
    features: Float32[np.ndarray | Array, "N D"],
    k: int,
    neighbors: str = "faiss",
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Int32[np.ndarray, "N k"]:
    """The k nearest images of every image by cosine, found by faiss.

    For galleries where the exact search takes too long: "faiss:IVF4096,Flat:nprobe=32" looks at 32
    of 4,096 clusters only. faiss searches a normalised copy of the features, on the CPU.

    Args:
        features: (N, D), checked.
        k: length of the lists.
        neighbors: "faiss" (exact), or "faiss:" and faiss's description of an index, or after a
            further ":" parameters of its search as faiss writes them (nprobe is 16 if not said).
        placement: whether processes search together; each makes the whole index.

    Raises:
        UserError: faiss is not installed, or does not take the index or its parameters.
    """
    faiss = _import_faiss()
    factory, parameters = [*neighbors.split(":")[1:], "", ""][:2]
    unit = np.array(features, np.float32, order="C")
    faiss.normalize_L2(unit)
    try:
        index = faiss.index_factory(unit.shape[1], factory or "Flat", faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            if hasattr(index, "cp"):
                index.cp.max_points_per_centroid = MOST_POINTS
            index.train(unit)
        index.add(unit)
        if hasattr(index, "nprobe"):
            index.nprobe = 16
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError as error:
        said = str(error).splitlines()[-1]
        raise UserError(f"neighbors is {neighbors!r}, but faiss says: {said}") from error
    if not placement.together:
        found = [index.search(unit, k)[1]]
    else:
        parts = [unit[i : i + _FAISS_BLOCK] for i in range(0, len(unit), _FAISS_BLOCK)]
        found = parallel.share(parts, lambda own: [index.search(part, k)[1] for part in own])
    return np.concatenate(found).astype(np.int32)


def check_neighbors(neighbors: Numbers, num: int, least: int) -> Int32[np.ndarray, "N k"]:
    """Return lists from outside with each image itself first, cut or kept as long as they are.

    Args:
        neighbors: (N, k) indices into queries and gallery stacked, nearest first.
        num: N.
        least: how long they must be.

    Raises:
        UserError: another shape or type, too short, indices out of range or twice in a list.
    """
    lists = np.asarray(neighbors)
    if lists.ndim != 2 or lists.dtype.kind not in "iu" or len(lists) != num:
        raise UserError(
            f"neighbors has shape {lists.shape} and type {lists.dtype}; expected whole numbers of "
            f"shape ({num}, k): one list for each query, then for each gallery image"
        )
    if lists.shape[1] < least:
        raise UserError(
            f"neighbors has lists of {lists.shape[1]}; these parameters need at least {least} "
            "(the image itself counts as one)"
        )
    if lists.min() < 0 or lists.max() >= num:
        raise UserError(
            f"neighbors holds indices {lists.min()}..{lists.max()}; expected 0..{num - 1} (an "
            "approximate search that found too few puts -1)"
        )
    lists = lists.astype(np.int32)
    ordered = np.sort(lists, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if twice.any():
        raise UserError(f"neighbors lists an image twice, e.g. in row {np.argmax(twice)}")
    itself = np.arange(num, dtype=np.int32)[:, None]
    # With duplicates a search may put another image first; one that it left out replaces the last.
    found = lists == itself
    key = np.where(found, -1, np.arange(lists.shape[1]))
    missing = ~found.any(1)
    key[missing, -1] = -1
    lists[missing, -1] = itself[missing, 0]
    return np.take_along_axis(lists, np.argsort(key, axis=1, kind="stable"), axis=1)

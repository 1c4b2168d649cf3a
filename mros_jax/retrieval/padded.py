"""k-reciprocal encoding with sets of bounded size, padded: what accelerators can hold.

The same sets as in `reciprocal`. Padding is the number of images, one beyond the last of them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from mros_jax.retrieval import blocks, distances, gathers, reciprocal
from mros_jax.retrieval.neighbors import Neighbors


def find_reciprocal(
    index: Int[Array, "B"], lists: Int[Array, "N length"], k: int
) -> Int[Array, "B k"]:
    """The first k of each image's list that have it among their first k."""
    near = lists[index, :k]
    mutual = (lists[near, :k] == index[:, None, None]).any(2)
    return jnp.where(mutual, near, len(lists))


def expand_sets(
    index: Int[Array, "B"], full: Int[Array, "N k"], half: Int[Array, "N h"]
) -> Int[Array, "B width"]:
    """Expanded k-reciprocal sets, rising (see `reciprocal.expand_sets`).

    A candidate that joins has less than a third of its h images outside the set, so each of k
    candidates adds at most (h - 1) // 3.
    """
    none = len(full)
    members = full[index]  # (B, k)
    theirs = half.at[members].get(mode="fill", fill_value=none)  # (B, k, h)
    there = theirs < none
    common = there & (theirs[..., None] == members[:, None, None, :]).any(3)
    accepted = 3 * common.sum(2) > 2 * there.sum(2)
    joined = jnp.where(accepted[:, :, None], theirs, none).reshape(len(index), -1)
    columns = jnp.sort(jnp.concatenate([members, joined], axis=1), axis=1)
    columns = jnp.sort(jnp.where(_begins(columns), columns, none), axis=1)
    return columns[:, : full.shape[1] * (1 + (half.shape[1] - 1) // 3)]


def _begins(ordered: Int[Array, "B m"]) -> Bool[Array, "B m"]:
    """Where a number differs from the one before it."""
    return jnp.diff(ordered, axis=1, prepend=-1) != 0


def weigh(
    index: Int[Array, "B"],
    columns: Int[Array, "B width"],
    similarity: Float[Array, "B N"],
    smallest: Float[Array, "B"],
) -> Float[Array, "B width"]:
    """Gaussian weights of these columns that sum to 1; 0 at padding."""
    inside = columns < similarity.shape[1]
    cosine = jnp.take_along_axis(similarity, columns, axis=1, mode="clip")
    cosine = jnp.where(columns == index[:, None], 1.0, cosine)
    weights = jnp.where(inside, jnp.exp(-scale(1.0 - cosine, smallest[:, None])), 0.0)
    return weights / weights.sum(1, keepdims=True)


def scale(cosine_distance: Float[Array, "B G"], smallest: Float[Array, "B 1"]) -> Array:
    """See `reciprocal.scale_distances`."""
    farthest = jnp.maximum(1.0 - smallest, jnp.finfo(jnp.float32).tiny)
    return jnp.maximum(cosine_distance, 0.0) / farthest


def average(
    near: Int[Array, "B k"], columns: Int[Array, "N width"], weights: Float[Array, "N width"]
) -> tuple[Int[Array, "B wider"], Float[Array, "B wider"]]:
    """Mean of the encodings of some images: each column once, then padding of weight 0."""
    num, none = near.shape[0], len(columns)
    columns, weights = (x[near].reshape(num, -1) for x in (columns, weights))
    columns, weights = jax.lax.sort((columns, weights / near.shape[1]), num_keys=1)
    place = jnp.cumsum(_begins(columns), axis=1) - 1
    row = jnp.arange(num)[:, None]
    merged = jnp.full_like(columns, none).at[row, place].set(columns)
    return merged, jnp.zeros_like(weights).at[row, place].add(weights)


def compute_jaccard(
    query: tuple[Int[Array, "B wider"], Float[Array, "B wider"]],
    gallery: tuple[Int[Array, "G wider"], Float[Array, "G wider"]],
    num: int,
) -> Float[Array, "B G"]:
    """1 - sum of minima / sum of maxima of each pair of encodings over `num` images."""
    columns, weights = query
    column = jnp.arange(len(columns))[:, None]
    vectors = jnp.zeros((num + 1, len(columns))).at[columns, column].set(weights)

    def add(shared: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        row, weight = at
        return shared + jnp.minimum(vectors[row], weight[:, None]), None

    begin = jnp.zeros((len(gallery[0]), len(columns)))
    entries = gallery[0].T, gallery[1].T
    shared: Array = jax.lax.scan(add, begin, entries, unroll=gathers.UNROLL)[0].T
    return 1.0 - shared / (2.0 - shared)


def encode(
    features: Float32[np.ndarray | Array, "N D"],
    neighbors: Neighbors,
    k1: int,
    k2: int,
    placement: blocks.Placement,
) -> tuple[Int[np.ndarray, "N wider"], Float32[np.ndarray, "N wider"]]:
    """`reciprocal.encode` on the devices: columns and weights of each image, padded."""
    lists, num = neighbors.indices, len(neighbors.indices)
    sets = [
        np.where(reciprocal.find_reciprocal(lists[:, :k]), lists[:, :k], num).astype(np.int32)
        for k in (k1 + 1, round(k1 / 2) + 1)
    ]
    placed = blocks.place_everywhere(features, placement)
    norms = jax.jit(distances.KINDS["similarity"].norms)(placed)
    shared = [placed, norms, *sets, neighbors.smallest]
    index, near = np.arange(num, dtype=np.int32), lists[:, :k2]
    weighed: tuple[np.ndarray, np.ndarray] = blocks.BlockMap(
        _weigh_sets, shared, placement=placement
    ).collect(num, num, lambda rows: [index[rows]], num_features=features.shape[1])
    averaged: tuple[np.ndarray, np.ndarray] = blocks.BlockMap(
        average, weighed, placement=placement
    ).collect(num, k2 * weighed[0].shape[1], lambda rows: [near[rows]])
    return averaged


def _weigh_sets(
    index: Int[Array, "B"],
    features: Float[Array, "N D"],
    norms: Float[Array, "N"],
    full: Int[Array, "N k"],
    half: Int[Array, "N h"],
    smallest: Float[Array, "N"],
) -> tuple[Int[Array, "B width"], Float[Array, "B width"]]:
    columns = expand_sets(index, full, half)
    similarity = distances.compute_similarity(features[index], features, norms)
    return columns, weigh(index, columns, similarity, smallest[index])


def measure(
    index: Int[Array, "B"],
    query: Float[Array, "Q D"],
    gallery: Float[Array, "G D"],
    inverse_norms: Float[Array, "G"],
    columns: Int[Array, "N wider"],
    weights: Float[Array, "N wider"],
    smallest: Float[Array, "N"],
    images: Int[Array, "G"],
    *,
    lambda_value: float,
) -> Float[Array, "B G"]:
    """k-reciprocal distances, see `rerank.KReciprocal`.

    Args:
        index: of the queries among all images; queries are stacked above the gallery.
        query: (Q, D) all queries.
        gallery: (G, D) the images to measure.
        inverse_norms: (G,) one over their norms.
        columns: of the encodings of all images.
        weights: of the same.
        smallest: (N,) the cosine of each image with the farthest.
        images: (G,) where the gallery's are among all.
        lambda_value: share of the distance without re-ranking.
    """
    of_query, of_gallery = ((columns[rows], weights[rows]) for rows in (index, images))
    jaccard = compute_jaccard(of_query, of_gallery, len(columns))
    cosine = distances.KINDS["cosine"].measure(query[index], gallery, inverse_norms)
    return (1 - lambda_value) * jaccard + lambda_value * scale(cosine, smallest[index, None])


@functools.cache
def make_measure(lambda_value: float) -> Callable[..., Array]:
    """`measure` with this share, as a `blocks.BlockMap` takes it."""
    return functools.partial(measure, lambda_value=lambda_value)

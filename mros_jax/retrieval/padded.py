"""k-reciprocal encoding with sets of bounded size, padded: what one compiled program can hold.

The same sets as in `reciprocal`. Padding is the number of images, one beyond the last of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mros_jax.retrieval import gathers


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

"""Re-ranking on accelerators; and ECN by dense gathers, what they do in place of sparse products.

All functions look at a block of queries, with the lists of neighbours of all images at hand, and
need (block, images) memory. Rank vectors hold whole numbers, so sums of their products are exact in
float32 below 2**24, in whichever order they are added.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from mros_jax.retrieval import blocks, distances

UNROLL = 5  # rows gathered in one pass over their sums

_Run = Callable[[int, Callable[[slice], Sequence[Any]]], Iterator[tuple[slice, Any]]]


def suit(placement: blocks.Placement) -> bool:
    """Whether dense gathers are the way to go: on a CPU, sparse products on the host are faster."""
    return all(device.platform != "cpu" for device in placement.list_devices())


def expand(lists: Int[Array, "N k"], t: int, q: int) -> Int[Array, "N m"]:
    """Expanded neighbours of each image: its t nearest and the q nearest of each of those.

    Args:
        lists: neighbours, nearest first, the image itself before them.
        t: nearest neighbours taken first.
        q: neighbours taken of each of those.
    """
    first = lists[:, 1 : t + 1]
    return jnp.concatenate([first, lists[first, 1 : q + 1].reshape(len(lists), t * q)], axis=1)


def _add_rows(
    sums: Float[Array, "R C"],
    table: Float[Array, "N C"],
    rows: Int[Array, "R m"],
    weights: Float[Array, "m"],
) -> Float[Array, "R C"]:
    """`sums`, and to each row the weighted sum of some rows of a table."""

    def add(sums: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        row, weight = at
        return sums + weight * table[row], None

    result: Array = jax.lax.scan(add, sums, (rows.T, weights), unroll=UNROLL)[0]
    return result


def count_totals(
    index: Int[Array, "B"],
    lists: Int[Array, "N length"],
    columns: Int[Array, "G"],
    *,
    k: int,
    t: int,
    q: int,
) -> Float[Array, "B G"]:
    """Sum of w_n . w_g over the query's expanded neighbours n, and of w_n . w_q over the image's.

    With w_n . w_q gathered once for all n from the dense row of w_q, the second sum is a gather of
    these; the first is one of the dense row of the sum of w_n. ECN is the total over
    -2 (t + t q), see `rerank.ECN`.

    Args:
        index: which images are the queries.
        lists: neighbours of all images, at least max(k, t + 1, q + 1).
        columns: which images are the gallery.
        k: length of the rank lists.
        t: nearest neighbours taken first.
        q: neighbours taken of each of those.

    Returns:
        Whole numbers; 0 where the two have no neighbour in common.
    """
    num, num_query = len(lists), len(index)
    expanded, lists = expand(lists, t, q), lists[:, :k]
    weights = jnp.arange(k, 0, -1, dtype=jnp.float32)

    def add_vectors(images: Int[Array, "B m"]) -> Float[Array, "N B"]:
        """Dense sums of rank vectors, a column for each query: gathers take whole rows of them."""
        column = jnp.arange(num_query)[:, None, None]
        return jnp.zeros((num, num_query)).at[lists[images], column].add(weights)

    vectors = jnp.concatenate([add_vectors(expanded[index]), add_vectors(index[:, None])], axis=1)
    products = _add_rows(jnp.zeros_like(vectors), vectors, lists, weights)  # (N, 2 B)
    first, second = products[columns, :num_query], products[:, num_query:]
    return _add_rows(first, second, expanded[columns], jnp.ones(expanded.shape[1])).T


def order(
    index: Int[Array, "B"],
    query: Float[Array, "Q D"],
    gallery: Float[Array, "G D"],
    inverse_norms: Float[Array, "G"],
    lists: Int[Array, "N length"],
    columns: Int[Array, "G"],
    *,
    k: int,
    t: int,
    q: int,
) -> Float[Array, "B G"]:
    """Numbers in the order of ECN distances: minus the total, or the cosine distance where it is 0.

    Totals are at least 1, cosine distances above -1: those come last here, too, and it can be told
    which they are.

    Args:
        index: of the queries among all images; queries are stacked above the gallery.
        query: (Q, D) all queries.
        gallery: (G, D) the images to order.
        inverse_norms: (G,) one over their norms.
        lists: see `count_totals`.
        columns: (G,) where these images are among all.
        k: length of the rank lists.
        t: nearest neighbours taken first.
        q: neighbours taken of each of those.
    """
    totals = count_totals(index, lists, columns, k=k, t=t, q=q)
    cosine = distances.KINDS["cosine"].measure(query[index], gallery, inverse_norms)
    return jnp.where(totals > 0, -totals, cosine)


@functools.cache
def make_order(k: int, t: int, q: int) -> Callable[..., Array]:
    """`order` with these parameters, as a `blocks.BlockMap` takes it."""
    return functools.partial(order, k=k, t=t, q=q)


def average_all(
    features: Float32[np.ndarray | Array, "N D"],
    lists: Int32[np.ndarray, "N m"],
    placement: blocks.Placement,
) -> Float32[np.ndarray, "N D"]:
    """Mean of the unit vectors of the images in each list."""
    placed = blocks.place_everywhere(features, placement)
    norms = jax.jit(distances.KINDS["similarity"].norms)(placed)
    average = blocks.BlockMap(_average_units, [placed, norms], placement=placement)
    size = features.shape[1]
    means: np.ndarray = average.collect(
        len(lists), size * lists.shape[1], lambda rows: [lists[rows]], num_features=size
    )
    return means


def _average_units(
    near: Int[Array, "B m"], features: Float[Array, "N D"], inverse_norms: Float[Array, "N"]
) -> Float[Array, "B D"]:
    return (features[near] * inverse_norms[near][..., None]).mean(1)


def order_by_means(
    index: Int[Array, "B"],
    query: Float[Array, "Q D"],
    gallery: Float[Array, "G D"],
    inverse_norms: Float[Array, "G"],
    means: Float[Array, "N D"],
    columns: Int[Array, "G"],
) -> Float[Array, "B G"]:
    """ECN of cosine distances: the mean of 1 - x_n . x_g over n is 1 - (mean of x_n) . x_g.

    Args:
        index: as for `order`, like all that are not below.
        query: see there.
        gallery: see there.
        inverse_norms: see there; not needed.
        means: of the unit vectors of each image's expanded neighbours.
        columns: see there.
    """

    def compare(images: Float[Array, "M D"], means: Float[Array, "K D"]) -> Float[Array, "M K"]:
        return distances.compute_similarity(images, means, jnp.ones(len(means)))

    from_query = compare(gallery, means[index]).T
    return 1.0 - (from_query + compare(query[index], means[columns])) / 2


@jax.jit
def expand_queries(
    query: Float[Array, "B D"], near: Float[Array, "B k D"], alpha: float | Float[Array, ""]
) -> Float[Array, "B D"]:
    """Each query plus its nearest images, weighed by their cosines to the power of alpha."""
    query = query / jnp.linalg.norm(query, axis=1, keepdims=True)
    near = near / jnp.linalg.norm(near, axis=2, keepdims=True)
    cosine = jnp.einsum("bd,bkd->bk", query, near, precision="highest")
    weight = jnp.maximum(cosine, 0.0) ** alpha
    return query + jnp.einsum("bk,bkd->bd", weight, near, precision="highest")


def expand_all(
    query: Float32[np.ndarray | Array, "Q D"],
    gallery: Float32[np.ndarray | Array, "G D"],
    lists: Int[np.ndarray, "Q k"],
    alpha: float,
    placement: blocks.Placement,
) -> Float32[np.ndarray, "Q D"]:
    """`expand_queries` of all queries, with these images of the gallery."""
    expand = blocks.BlockMap(_expand_near, [gallery, np.float32(alpha)], placement=placement)
    size = gallery.shape[1]
    found: np.ndarray = expand.collect(
        len(query),
        size * lists.shape[1],
        lambda rows: [query[rows], lists[rows]],
        num_features=size,
    )
    return found


def _expand_near(
    query: Float[Array, "B D"],
    near: Int[Array, "B k"],
    gallery: Float[Array, "G D"],
    alpha: Float[Array, ""],
) -> Float[Array, "B D"]:
    expanded: Array = expand_queries(query, gallery[near], alpha)
    return expanded


def order_by_cosine(
    index: Int[Array, "B"],
    query: Float[Array, "Q D"],
    gallery: Float[Array, "G D"],
    inverse_norms: Float[Array, "G"],
    columns: Int[Array, "G"],
) -> Float[Array, "B G"]:
    """Plain cosine distances of new queries; arguments as for `order`."""
    return distances.KINDS["cosine"].measure(query[index], gallery, inverse_norms)


class DeviceRows:
    """Distances of blocks of queries, made on the devices; see `rerank.Rows`.

    Args:
        order: of index, query, gallery, inverse norms, the `shared` arrays and columns: (B, G), as
            `order` here, numbers in the order of distances. Made once, see `blocks.BlockMap`.
        query: (Q, D), checked.
        gallery: (G, D), checked.
        shared: of all images, queries stacked above the gallery.
        restore: from these numbers to distances, on the host; None where they are distances.
        placement: devices and block size.
    """

    def __init__(
        self,
        order: Callable[..., Array],
        query: Float32[np.ndarray | Array, "Q D"],
        gallery: Float32[np.ndarray | Array, "G D"],
        shared: Sequence[np.ndarray],
        *,
        restore: Callable[[np.ndarray], np.ndarray] | None = None,
        placement: blocks.Placement,
    ):
        self._order, self._restore = order, restore
        self._query, self._gallery, self._shared = query, gallery, shared
        self._placement = placement

    def _map(self, columns: np.ndarray, placement: blocks.Placement, **options: Any) -> _Run:
        everything = len(columns) == len(self._gallery)
        gallery = self._gallery if everything else blocks.take_rows(self._gallery, columns)
        placed = blocks.place_everywhere(gallery, placement)
        norms = jax.jit(distances.KINDS["cosine"].norms)(placed)
        images = (columns + len(self._query)).astype(np.int32)
        shared = [self._query, placed, norms, *self._shared, images]
        mapped = blocks.BlockMap(self._order, shared, placement=placement, **options)
        num, size = len(self._query) + len(self._gallery), gallery.shape[1]
        return lambda num_rows, get: mapped.run(num_rows, num, get, num_features=size)

    @functools.cached_property
    def _everything(self) -> _Run:
        return self._map(np.arange(len(self._gallery)), self._placement.alone())

    def __call__(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the distances of some queries."""
        index = rows.astype(np.int32)
        for part, order in self._everything(len(rows), lambda part: [index[part]]):
            out[part] = order if self._restore is None else self._restore(order)

    def look_at(self, look: Callable[..., Any], columns: np.ndarray) -> _Run:
        """`blocks.BlockMap.run` of `look` at blocks of `order`, of some columns of the gallery.

        The first row array is of indices of queries.
        """
        return self._map(columns, self._placement, look=look)

"""Distances and scores as one compiled program each, from descriptors on: nothing visits the host.

For programs of your own: both functions can be called under `jax.jit`, `jax.vmap` and, with
`axis_name`, `jax.shard_map`. They compute what `Rerank.distances` and `evaluate` do, block by block
and without an array of all pairs of images, but check nothing: compiled code cannot raise. They are
made for accelerators; on a CPU `evaluate` is faster.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mros_jax.errors import UserError, check_choice
from mros_jax.retrieval import blocks, distances, gathers, neighbors, padded
from mros_jax.retrieval.inputs import check_count
from mros_jax.retrieval.metrics import AP_VARIANTS, count_ranks
from mros_jax.retrieval.rerank import ECN, KReciprocal


class Scores(NamedTuple):
    """Metrics as fractions of 1, float32; see `metrics.Result`.

    Attributes:
        mAP: mean average precision over valid queries; NaN where no query is valid.
        mINP: mean of (number of matches / rank of the last match).
        cmc: (max_rank,) cmc[k - 1] is the share of valid queries with a match at rank <= k.
        ap: (Q,) average precision of each query; NaN where it has no match.
        ranks: (Q, most_per_pid) ranks of its matches from 1, rising; 0 after the last.
    """

    mAP: Float[Array, ""]
    mINP: Float[Array, ""]
    cmc: Float[Array, "max_rank"]
    ap: Float[Array, "Q"]
    ranks: Int[Array, "Q most_per_pid"]


class _Blocks(NamedTuple):
    """How rows are worked on: so many at a time, on a named axis of devices if there is one."""

    size: int
    axis_name: str | None

    def map(self, function: Callable[[Array], Any], num_rows: int) -> Any:
        """Results of all rows, of a function of the indices of a block of them."""
        devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
        share = -(-num_rows // devices)
        size = min(self.size, -(-share // blocks.MULTIPLE) * blocks.MULTIPLE)
        count = -(-share // size)
        index = jnp.minimum(jnp.arange(devices * count * size), num_rows - 1)
        index = index.reshape(devices, count, size)
        own = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name)

        def join(result: Array) -> Array:
            result = result.reshape(count * size, *result.shape[2:])
            if self.axis_name is not None:
                result = jax.lax.all_gather(result, self.axis_name, tiled=True)
            return result[:num_rows]

        return jax.tree.map(join, jax.lax.map(function, index[own]))


class _Images(NamedTuple):
    """Queries stacked above gallery; hidden ones are nobody's neighbours."""

    features: Float[Array, "N D"]
    norms: Float[Array, "N"]
    hidden: Bool[Array, "N"]

    def compare(self, index: Int[Array, "B"]) -> Float[Array, "B N"]:
        """Cosines with all images. They are numbers in memory, not computed anew in each use."""
        similarity = distances.compute_similarity(self.features[index], self.features, self.norms)
        kept: Array = jax.lax.optimization_barrier(similarity)
        return kept

    def search(self, k: int, mapped: _Blocks) -> tuple[Int[Array, "N k"], Float[Array, "N"]]:
        """The k nearest images of every image, itself first, and the cosine with the farthest."""
        look = neighbors.make_look(k)

        def search(index: Int[Array, "B"]) -> tuple[Array, Array]:
            similarity = self.compare(index)
            nearest = look(jnp.where(self.hidden, -jnp.inf, similarity), index)[0]
            return nearest, similarity.min(1, where=~self.hidden, initial=jnp.inf)

        found: tuple[Array, Array] = mapped.map(search, len(self.features))
        return found


def _make_order(
    query: Float[Array, "Q D"],
    gallery: Float[Array, "G D"],
    hidden: Bool[Array, "G"],
    rerank: ECN | KReciprocal | None,
    mapped: _Blocks,
) -> Callable[[Array], Array]:
    """A function of indices of queries: numbers (B, G) in the order of their distances."""
    norms = distances.KINDS["cosine"].norms(gallery)
    if rerank is None:
        return lambda index: distances.KINDS["cosine"].measure(query[index], gallery, norms)
    num_query = len(query)
    rerank.check(num_query, len(gallery))
    features = jnp.concatenate([query, gallery])
    everywhere = jnp.concatenate([jnp.zeros(num_query, bool), hidden])
    images = _Images(features, distances.KINDS["similarity"].norms(features), everywhere)
    lists, smallest = images.search(rerank.list_length, mapped)
    below = jnp.arange(num_query, len(features))
    if isinstance(rerank, ECN):
        order = gathers.make_order(rerank.k, rerank.t, rerank.q)
        return lambda index: order(index, query, gallery, norms, lists, below)

    encoded = _encode(images, lists, smallest, rerank, mapped)
    measure = padded.make_measure(rerank.lambda_value)
    return lambda index: measure(index, query, gallery, norms, *encoded, smallest, below)


def _encode(
    images: _Images,
    lists: Int[Array, "N length"],
    smallest: Float[Array, "N"],
    rerank: KReciprocal,
    mapped: _Blocks,
) -> tuple[Int[Array, "N wider"], Float[Array, "N wider"]]:
    """`padded.encode` within a program."""
    num = len(lists)
    lengths = rerank.k1 + 1, round(rerank.k1 / 2) + 1
    full, half = mapped.map(
        lambda index: tuple(padded.find_reciprocal(index, lists, k) for k in lengths), num
    )

    def weigh(index: Int[Array, "B"]) -> tuple[Array, Array]:
        columns = padded.expand_sets(index, full, half)
        return columns, padded.weigh(index, columns, images.compare(index), smallest[index])

    columns, weights = mapped.map(weigh, num)
    near = lists[:, : rerank.k2]
    encoded: tuple[Array, Array] = mapped.map(
        lambda index: padded.average(near[index], columns, weights), num
    )
    return encoded


def _check(rerank: ECN | KReciprocal | None) -> None:
    compiled = isinstance(rerank, ECN | KReciprocal) and rerank.neighbors == "exact"
    if rerank is not None and (not compiled or getattr(rerank, "method", "") == "origdist"):
        raise UserError(
            f"rerank is {rerank!r}; compiled are None, KReciprocal, and ECN with method "
            "'rankdist'; all with neighbors 'exact'"
        )


@functools.partial(jax.jit, static_argnames=("rerank", "block_size", "axis_name"))
def compute_distances(
    query_features: Float[Array, "Q D"],
    gallery_features: Float[Array, "G D"],
    *,
    rerank: ECN | KReciprocal | None = None,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "Q G"]:
    """Distance of every query to every gallery image, re-ranked or by cosine.

    Args:
        query_features: (Q, D), of any norm whose square float32 can hold, but zero.
        gallery_features: (G, D).
        rerank: None, or `ECN` or `KReciprocal` with their parameters.
        block_size: queries worked on at once; None: see `blocks.choose_block`.
        axis_name: within `jax.shard_map`, with the same arguments on all devices of this axis: each
            works on a share of the images, and all get the whole.

    Raises:
        UserError: a method that is not compiled; parameters that ask for more images than there
            are.
    """
    _check(rerank)
    num_query, num = len(query_features), len(query_features) + len(gallery_features)
    size = blocks.choose_block(num, query_features.shape[1], block_size)
    mapped = _Blocks(size, axis_name)
    hidden = jnp.zeros(len(gallery_features), bool)
    order = _make_order(query_features, gallery_features, hidden, rerank, mapped)

    def measure(index: Int[Array, "B"]) -> Float[Array, "B G"]:
        ordered = order(index)
        if not isinstance(rerank, ECN):
            return ordered
        # Division by one number would become a product with its inverse, which rounds otherwise.
        count = jnp.full_like(ordered, 2.0 * (rerank.t + rerank.t * rerank.q))
        return jnp.where(ordered <= -1, ordered / jax.lax.optimization_barrier(count), ordered)

    result: Array = mapped.map(measure, num_query)
    return result


@functools.partial(
    jax.jit,
    static_argnames=(
        *("most_per_pid", "rerank", "ap", "max_rank", "keep_junk", "junk_pid", "distractor_pid"),
        *("block_size", "axis_name"),
    ),
)
def evaluate(
    query_features: Float[Array, "Q D"],
    gallery_features: Float[Array, "G D"],
    query_pids: Int[Array, "Q"],
    gallery_pids: Int[Array, "G"],
    query_camids: Int[Array, "Q"],
    gallery_camids: Int[Array, "G"],
    *,
    most_per_pid: int,
    rerank: ECN | KReciprocal | None = None,
    ap: str = "standard",
    max_rank: int = 50,
    keep_junk: bool = False,
    junk_pid: int | None = -1,
    distractor_pid: int | None = 0,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Scores:
    """CMC, mAP and mINP of normalised descriptors, by the rules of `metrics.evaluate`.

    Junk stays in its place and is masked, so galleries of several sizes become one shape, e.g. for
    `jax.vmap`, by rows of junk below them (of any descriptor but zero).

    Args:
        query_features: (Q, D), of any norm whose square float32 can hold, but zero.
        gallery_features: (G, D).
        query_pids: (Q,) identities, whole numbers of 32 bits, as all labels.
        gallery_pids: (G,).
        query_camids: (Q,) cameras.
        gallery_camids: (G,).
        most_per_pid: the most gallery images of one identity. Queries of an identity that has more
            get NaN, and so does each mean.
        rerank: None, or `ECN` or `KReciprocal` with their parameters. With fewer images that are no
            junk than its lists are long, all is NaN.
        ap: "standard" or "trapezoid".
        max_rank: length of the CMC curve.
        keep_junk: let junk images take part in re-ranking as neighbours.
        junk_pid: pid of junk images; None if there are none.
        distractor_pid: pid that never matches; None where it is a person like others.
        block_size: as for `compute_distances`.
        axis_name: as for `compute_distances`.

    Raises:
        UserError: as `compute_distances`; an unknown `ap`, or counts below 1.
    """
    _check(rerank)
    check_choice("ap", ap, AP_VARIANTS)
    check_count(most_per_pid, "most_per_pid")
    check_count(max_rank, "max_rank")
    num_query, num = len(query_features), len(query_features) + len(gallery_features)
    mapped = _Blocks(blocks.choose_block(num, query_features.shape[1], block_size), axis_name)
    junk = jnp.zeros(len(gallery_pids), bool) if junk_pid is None else gallery_pids == junk_pid
    hidden = junk & (not keep_junk)
    order = _make_order(query_features, gallery_features, hidden, rerank, mapped)
    people = jnp.ones(num_query, bool)
    for pid in (junk_pid, distractor_pid):
        people &= True if pid is None else query_pids != pid
    labels = query_pids, gallery_pids, query_camids, gallery_camids
    matches, removed, fits = _list_matches(*labels, people, most_per_pid)
    if rerank is not None:
        fits &= num_query + (~hidden).sum() >= rerank.list_length

    def rank(index: Int[Array, "B"]) -> Int[Array, "B M"]:
        # Each distance is computed once, as in `_Images`.
        ordered = jax.lax.optimization_barrier(jnp.where(junk, jnp.inf, order(index)))
        return count_ranks(ordered, matches[index], removed[index])

    ranks = jnp.where(matches >= 0, mapped.map(rank, num_query), 0)
    return _summarize(ranks, fits, ap, max_rank)


def _list_matches(
    query_pids: Int[Array, "Q"],
    gallery_pids: Int[Array, "G"],
    query_camids: Int[Array, "Q"],
    gallery_camids: Int[Array, "G"],
    people: Bool[Array, "Q"],
    most: int,
) -> tuple[Int[Array, "Q M"], Int[Array, "Q M"], Bool[Array, "Q"]]:
    """Matches of each query, what is removed from its ranking, and whether there was room for them.

    Both are gallery indices, rising, and then -1. `people` are the queries that can have matches.
    """
    by_pid = jnp.argsort(gallery_pids, stable=True)
    ordered = gallery_pids[by_pid]
    first = jnp.searchsorted(ordered, query_pids, side="left")
    length = jnp.where(people, jnp.searchsorted(ordered, query_pids, side="right") - first, 0)
    place = jnp.arange(most)
    same_pid = by_pid.at[first[:, None] + place].get(mode="clip")
    same_camera = gallery_camids[same_pid] == query_camids[:, None]

    def select(mask: Bool[Array, "Q M"]) -> Int[Array, "Q M"]:
        num = len(gallery_pids)
        rising = jnp.sort(jnp.where(mask & (place < length[:, None]), same_pid, num), axis=1)
        return jnp.where(rising < num, rising, -1)

    return select(~same_camera), select(same_camera), length <= most


def _summarize(ranks: Int[Array, "Q M"], fits: Bool[Array, "Q"], ap: str, max_rank: int) -> Scores:
    """Metrics from the ranks of matches, 0 where there is none; NaN where they do not fit."""
    found = ranks > 0
    lengths = found.sum(1)
    largest = jnp.iinfo(ranks.dtype).max
    rising = jnp.sort(jnp.where(found, ranks, largest), axis=1)
    found = rising < largest
    i = jnp.arange(1, ranks.shape[1] + 1)
    precision = i / rising
    if ap == "trapezoid":
        before = jnp.where(rising == 1, 1.0, (i - 1) / jnp.maximum(rising - 1, 1))
        precision = (precision + before) / 2
    last = jnp.where(found, rising, 0).max(1)
    valid = (lengths > 0) | ~fits

    average = jnp.where(fits, jnp.where(found, precision, 0.0).sum(1) / lengths, jnp.nan)
    hits = jnp.where(fits[:, None], rising[:, :1] <= jnp.arange(1, max_rank + 1), jnp.nan)
    return Scores(
        mAP=average.mean(where=valid),
        mINP=jnp.where(fits, lengths / last, jnp.nan).mean(where=valid),
        cmc=hits.mean(0, where=valid[:, None]),
        ap=average,
        ranks=jnp.where(found, rising, 0),
    )

"""CMC, mAP and mINP from ranks that are counted, never sorted.

The metrics need only the ranks of the true matches of a query, and the rank of a match is one more
than the number of gallery images before it. Counting those in the block of distances that was just
computed needs O(block x gallery) memory and no sort of the gallery.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Int64, Shaped

from mros_jax.retrieval import blocks, distances
from mros_jax.retrieval import rerank as reranking
from mros_jax.retrieval.inputs import Numbers, check_choice, check_count, check_pair
from mros_jax.retrieval.labels import Labels, check_labels, ragged_positions

AP_VARIANTS = ("standard", "trapezoid")


@dataclasses.dataclass(frozen=True)
class Result:
    """Metrics as fractions of 1, per-query numbers, and the protocol that made them.

    Attributes:
        mAP: mean average precision over valid queries.
        mINP: mean of (number of matches / rank of the last match).
        cmc: (max_rank,) cmc[k - 1] is the share of valid queries with a match at rank <= k.
        ap: (V,) average precision of each valid query, in query order.
        inp: (V,) number of matches / rank of the last match.
        first_match_rank: (V,) rank of the first match, from 1.
        valid_queries: (V,) indices of the queries that have a match.
        invalid_queries: (Q - V,) indices of those that have none and are left out of every mean.
        query_pids: (V,) identity of each valid query.
        protocol: what was done, in plain values.
    """

    mAP: float
    mINP: float
    cmc: Float64[np.ndarray, "max_rank"]
    ap: Float64[np.ndarray, "V"]
    inp: Float64[np.ndarray, "V"]
    first_match_rank: Int64[np.ndarray, "V"]
    valid_queries: Int64[np.ndarray, "V"]
    invalid_queries: Int64[np.ndarray, "I"]
    query_pids: Int64[np.ndarray, "V"]
    protocol: dict[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """A result from its plain values, as `to_dict` made them; further entries are ignored.

        Raises:
            ValueError: entries are missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"this result lacks {', '.join(missing)}")
        whole = ("first_match_rank", "valid_queries", "invalid_queries", "query_pids")
        fields: dict[str, Any] = {name: values[name] for name in names}
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = np.asarray(value, np.int64 if name in whole else np.float64)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, as results.json holds it."""
        values = dataclasses.asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        ranks = [k for k in (1, 5, 10) if k <= len(self.cmc)]
        shares = "  ".join(f"Rank-{k} {100 * self.cmc[k - 1]:.2f}" for k in ranks)
        return f"mAP {100 * self.mAP:.2f}  mINP {100 * self.mINP:.2f}  {shares}"


def count_ranks(
    distance: Shaped[Array, "B G"],
    matches: Int[Array, "B M"],
    removed: Int[Array, "B R"],
) -> Int[Array, "B M"]:
    """Rank (from 1) of each match among the kept gallery images; -1 in a list is padding.

    Equal distances are ordered by gallery index, as a stable sort orders them. An image is never
    before itself.
    """
    column = jnp.arange(distance.shape[1])

    def count_rows(rows: tuple[Array, Array, Array]) -> Array:
        d, match, gone = rows
        d_match = jnp.take_along_axis(d, match, axis=1)  # (rows, M)
        d_gone = jnp.take_along_axis(d, gone, axis=1)  # (rows, R)

        def count_one(i: Array, ranks: Array) -> Array:
            at, index = d_match[:, i, None], match[:, i, None]

            def comes_before(d: Array, place: Array) -> Array:
                return (place != index) & ((d < at) | ((d == at) & (place < index)))

            before = comes_before(d, column)
            gone_before = (gone >= 0) & comes_before(d_gone, gone)
            rank = 1 + before.sum(1, dtype=jnp.int32) - gone_before.sum(1, dtype=jnp.int32)
            return ranks.at[:, i].set(rank)

        most = (match >= 0).sum(1).max()
        return jax.lax.fori_loop(0, most, count_one, jnp.zeros(match.shape, jnp.int32))

    # A few rows at a time stay in a core's cache while their matches are counted one by one.
    groups = [x.reshape(-1, blocks.MULTIPLE, x.shape[1]) for x in (distance, matches, removed)]
    return jax.lax.map(count_rows, tuple(groups)).reshape(matches.shape)


def _count_given(distance: Array, matches: Array, removed: Array) -> tuple[Array, Array]:
    """Ranks, and which rows hold NaN: that comes before nothing and would improve ranks, unseen."""
    return count_ranks(distance, matches, removed), jnp.isnan(distance).any(1)


def _rank_matches(
    rows_of: Callable[[np.ndarray], Any],
    mapped: blocks.BlockMap,
    labels: Labels,
    num_features: int,
    block_size: int | None,
) -> Int64[np.ndarray, "P"]:
    """Ranks of all matches, in the order of `labels.matches.indices`."""
    matches, removed = labels.matches, labels.removed
    # Queries with equally many matches go together: rows cost as much as the longest list of them.
    order = np.argsort(-matches.lengths, kind="stable")
    order = order[: np.count_nonzero(matches.lengths)]

    def get(rows: slice) -> tuple[Any, ...]:
        return rows_of(order[rows]), matches.pad(order[rows]), removed.pad(order[rows])

    ranks = np.empty(len(matches.indices), np.int64)
    for rows, block in mapped.run(
        len(order), len(labels.kept), get, num_features=num_features, block_size=block_size
    ):
        chosen = order[rows]
        if isinstance(block, tuple):
            block, bad = block
            if bad.any():
                raise ValueError(f"distance holds NaN, e.g. in row {chosen[np.argmax(bad)]}")
        ranks[matches.places(chosen)] = block[ragged_positions(matches.lengths[chosen])]
    return ranks


def _summarise(
    ranks: Int64[np.ndarray, "P"],
    labels: Labels,
    ap: str,
    max_rank: int,
    protocol: dict[str, Any],
) -> Result:
    """Metrics in float64 from the ranks of all matches."""
    lengths, starts = labels.matches.lengths, labels.matches.starts
    row, position = ragged_positions(lengths)
    ranks = ranks[np.lexsort((ranks, row))]
    i = position + 1.0
    precision = i / ranks
    if ap == "trapezoid":
        # The Market-1501 rule: the mean with the precision just before the match, 1 at rank 1.
        before = np.where(ranks == 1, 1.0, (i - 1) / np.maximum(ranks - 1, 1))
        precision = (precision + before) / 2
    valid = np.flatnonzero(lengths)
    per_query = np.bincount(row, precision, minlength=len(lengths))[valid] / lengths[valid]
    first_match_rank = ranks[starts[valid]]
    inp = lengths[valid] / ranks[starts[valid + 1] - 1]
    counts = np.bincount(np.minimum(first_match_rank, max_rank + 1), minlength=max_rank + 2)
    sizes = {
        "ap": ap,
        "max_rank": max_rank,
        "num_query": len(lengths),
        "num_valid_queries": len(valid),
        "num_gallery": len(labels.kept),
        "num_junk": labels.num_junk,
        "num_distractors": labels.num_distractors,
    }
    return Result(
        mAP=float(per_query.mean()),
        mINP=float(inp.mean()),
        cmc=np.cumsum(counts[1 : max_rank + 1]) / len(valid),
        ap=per_query,
        inp=inp,
        first_match_rank=first_match_rank,
        valid_queries=valid,
        invalid_queries=np.flatnonzero(lengths == 0),
        query_pids=labels.query_pids[valid],
        protocol=sizes | protocol,
    )


def evaluate_distances(
    distance: Numbers,
    query_pids: Numbers,
    gallery_pids: Numbers,
    query_camids: Numbers,
    gallery_camids: Numbers,
    *,
    ap: str = "standard",
    max_rank: int = 50,
    junk_pid: int | None = -1,
    distractor_pid: int | None = 0,
    protocol: Mapping[str, Any] | None = None,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """CMC, mAP and mINP of a given matrix of distances (smaller is more alike).

    The rules are those of `evaluate`. A float64 matrix is ranked in float64.

    Args:
        distance: (Q, G).
        query_pids: (Q,) identities, whole numbers.
        gallery_pids: (G,).
        query_camids: (Q,) cameras.
        gallery_camids: (G,).
        ap: "standard" or "trapezoid".
        max_rank: length of the CMC curve.
        junk_pid: gallery images of this pid do not count at all; None if there are none such.
        distractor_pid: images of this pid never match; None where it is a person like others.
        protocol: further entries for the result's protocol.
        block_size: queries in a block on one device.
        devices: default all local devices.

    Raises:
        ValueError: NaN distances, wrong shapes, labels that are no whole numbers, no valid query.
    """
    check_choice(ap, "ap", AP_VARIANTS)
    check_count(max_rank, "max_rank")
    matrix = distance if isinstance(distance, jax.Array) else np.asarray(distance)
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiubV" or 0 in matrix.shape:
        raise ValueError(
            f"distance has shape {matrix.shape} and type {matrix.dtype}; expected numbers of shape "
            "(queries, gallery)"
        )
    if matrix.dtype.kind == "f" and matrix.dtype.itemsize < 4:
        matrix = matrix.astype(np.float32)
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    labels = check_labels(
        query_pids,
        gallery_pids,
        query_camids,
        gallery_camids,
        *matrix.shape,
        junk_pid=junk_pid,
        distractor_pid=distractor_pid,
    )

    def rows_of(rows: np.ndarray) -> Any:
        return matrix[rows][:, labels.kept] if labels.num_junk else matrix[rows]

    with jax.enable_x64(matrix.dtype == np.float64):
        mapped = blocks.BlockMap(None, look=_count_given, devices=devices)
        ranks = _rank_matches(rows_of, mapped, labels, 1, block_size)
    described = {
        "metric": "given distances",
        "rerank": None,
        "junk_pid": junk_pid,
        "distractor_pid": distractor_pid,
    }
    return _summarise(ranks, labels, ap, max_rank, described | dict(protocol or {}))


def evaluate(
    query_features: Numbers,
    gallery_features: Numbers,
    query_pids: Numbers,
    gallery_pids: Numbers,
    query_camids: Numbers,
    gallery_camids: Numbers,
    *,
    metric: str = "cosine",
    ap: str = "standard",
    max_rank: int = 50,
    rerank: str | None = None,
    rerank_options: Mapping[str, Any] | None = None,
    normalize: bool = True,
    keep_junk: bool = False,
    junk_pid: int | None = -1,
    distractor_pid: int | None = 0,
    protocol: Mapping[str, Any] | None = None,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """CMC, mAP and mINP of descriptors by the Market-1501 protocol (single query).

    Junk never counts; distractors stay in the gallery and never match; images of the query's own
    pid *and* camera are removed from its ranking, and nothing else is. A query without a match is
    left out of every mean and reported. Equal distances are ordered by gallery index. Distances
    are float32 (products at the highest precision); average precisions are summed in float64.

    Args:
        query_features: (Q, D) float32; other types are converted.
        gallery_features: (G, D).
        query_pids: (Q,) identities, whole numbers.
        gallery_pids: (G,).
        query_camids: (Q,) cameras.
        gallery_camids: (G,).
        metric: "cosine" or "euclidean".
        ap: "standard" (mean of i / r_i, as fast-reid, torchreid and the strong baseline) or
            "trapezoid" (the Market-1501 MATLAB code; lower by up to 1 point of mAP).
        max_rank: length of the CMC curve.
        rerank: None, "ecn", "k_reciprocal" or "aqe" (see `mros_jax.retrieval.rerank`).
        rerank_options: keyword arguments for it, e.g. {"k": 25}.
        normalize: divide descriptors by their norm first. Re-ranking always does.
        keep_junk: let junk images take part in re-ranking as neighbours. They never count.
        junk_pid: pid of junk images; None if there are none.
        distractor_pid: pid that never matches; None where 0 is a person like others.
        protocol: further entries for the result's protocol, e.g. the data set's name.
        block_size: queries in a block on one device; default 128 to 512 (see `blocks`).
        devices: blocks of queries are spread over them; default all local devices.

    Returns:
        A `Result`.

    Raises:
        ValueError: NaN or zero features (their rows are named), mismatched lengths, labels that
            are no whole numbers, no valid query (and why), lists longer than the gallery.

    Example:
        >>> features = np.eye(4, dtype=np.float32)
        >>> result = evaluate(features[:1], features[[0, 1]], [7], [7, 8], [1], [2, 2])
        >>> result.mAP
        1.0
    """
    check_choice(metric, "metric", distances.METRICS)
    check_choice(ap, "ap", AP_VARIANTS)
    check_choice(rerank, "rerank", (None, *reranking.METHODS))
    check_count(max_rank, "max_rank")
    query, gallery = check_pair(
        query_features, gallery_features, normalize=normalize or rerank is not None
    )
    labels = check_labels(
        query_pids,
        gallery_pids,
        query_camids,
        gallery_camids,
        len(query),
        len(gallery),
        junk_pid=junk_pid,
        distractor_pid=distractor_pid,
    )
    options = dict(rerank_options or {})
    keep_junk = keep_junk and rerank is not None
    if labels.num_junk and not keep_junk:
        gallery = blocks.take_rows(gallery, labels.kept)
    described = {
        "metric": metric,
        "normalize": normalize,
        "rerank": rerank,
        "rerank_options": reranking.describe(rerank, options) if rerank else None,
        "junk": "neighbours in re-ranking" if keep_junk else "dropped",
        "junk_pid": junk_pid,
        "distractor_pid": distractor_pid,
    }
    if rerank is None:
        kind = distances.choose_kind(metric, normalize)
        shared = distances.place_gallery(gallery, kind, devices)
        mapped = blocks.BlockMap(
            distances.KINDS[kind].measure, shared, look=count_ranks, devices=devices
        )
        ranks = _rank_matches(lambda rows: query[rows], mapped, labels, query.shape[1], block_size)
    else:
        prepare = reranking.METHODS[rerank]
        write = prepare(query, gallery, block_size=block_size, devices=devices, **options)
        columns = labels.kept if keep_junk else slice(None)

        def rows_of(rows: np.ndarray) -> np.ndarray:
            block = np.empty((len(rows), len(gallery)), np.float32)
            write(rows, block)
            return block[:, columns]

        mapped = blocks.BlockMap(None, look=_count_given, devices=devices)
        ranks = _rank_matches(rows_of, mapped, labels, 1, block_size)
    return _summarise(ranks, labels, ap, max_rank, described | dict(protocol or {}))

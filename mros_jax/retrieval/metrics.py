"""CMC, mAP and mINP from ranks that are counted, never sorted.

The metrics need only the ranks of the true matches of a query, and the rank of a match is one more
than the number of gallery images before it. Counting those in the block of distances that was just
computed needs O(block x gallery) memory and no sort of the gallery.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Int64, Shaped

from mros_jax.retrieval import blocks, distances
from mros_jax.retrieval import rerank as reranking
from mros_jax.retrieval.inputs import (
    Numbers,
    check_choice,
    check_count,
    check_ids,
    check_pair,
)

AP_VARIANTS = ("standard", "trapezoid")
_ROWS = 32  # rows that are counted together: small enough to stay in a core's cache


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


@dataclasses.dataclass(frozen=True)
class _Lists:
    """Ragged lists of gallery indices, one list a query."""

    starts: Int64[np.ndarray, "Q+1"]
    indices: Int64[np.ndarray, "P"]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def pad(self, rows: np.ndarray) -> Int[np.ndarray, "B M"]:
        """Lists of `rows` side by side, -1 after the end; the width a power of two, to limit
        the number of compilations."""
        lengths = self.lengths[rows]
        width = 1 << max(3, int(lengths.max() - 1).bit_length()) if lengths.max() else 1
        table = np.full((len(rows), width), -1, np.int32)
        row, column = ragged_positions(lengths)
        table[row, column] = self.indices[np.repeat(self.starts[rows], lengths) + column]
        return table


def ragged_positions(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, position in the row) of every element of ragged rows."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _split_lists(
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    query_camids: np.ndarray,
    gallery_camids: np.ndarray,
    distractor_pid: int | None,
) -> tuple[_Lists, _Lists]:
    """Gallery indices that match each query, and those removed (same pid, same camera)."""
    by_pid = np.argsort(gallery_pids, kind="stable")
    sorted_pids = gallery_pids[by_pid]
    first = np.searchsorted(sorted_pids, query_pids, "left")
    lengths = np.searchsorted(sorted_pids, query_pids, "right") - first
    if distractor_pid is not None:
        lengths[query_pids == distractor_pid] = 0
    row, position = ragged_positions(lengths)
    same_pid = by_pid[first[row] + position]
    same_camera = gallery_camids[same_pid] == query_camids[row]

    def select(mask: np.ndarray) -> _Lists:
        counts = np.bincount(row[mask], minlength=len(query_pids))
        return _Lists(np.concatenate([[0], np.cumsum(counts)]), same_pid[mask])

    return select(~same_camera), select(same_camera)


def count_ranks(
    matches: Int[Array, "B M"],
    removed: Int[Array, "B R"],
    distance: Shaped[Array, "B G"],
) -> Int[Array, "B M"]:
    """Rank (from 1) of each match among the kept gallery images; -1 in a list is padding.

    Equal distances are ordered by gallery index, as a stable sort orders them.
    """
    column = jnp.arange(distance.shape[1])

    def count_rows(rows: tuple[Array, Array, Array]) -> Array:
        d, match, gone = rows
        d_match = jnp.take_along_axis(d, match, axis=1)  # (rows, M)
        d_gone = jnp.where(gone < 0, jnp.inf, jnp.take_along_axis(d, gone, axis=1))  # (rows, R)

        def count_one(i: Array, ranks: Array) -> Array:
            at, index = d_match[:, i, None], match[:, i, None]
            before = (d < at) | ((d == at) & (column < index))
            gone_before = (d_gone < at) | ((d_gone == at) & (gone < index))
            rank = 1 + before.sum(1, dtype=jnp.int32) - gone_before.sum(1, dtype=jnp.int32)
            return ranks.at[:, i].set(rank)

        most = (match >= 0).sum(1).max()
        return jax.lax.fori_loop(0, most, count_one, jnp.zeros(match.shape, jnp.int32))

    groups = [x.reshape(-1, _ROWS, x.shape[1]) for x in (distance, matches, removed)]
    return jax.lax.map(count_rows, tuple(groups)).reshape(matches.shape)


@functools.cache
def _count_from_features(kind: str) -> Callable:
    def count(matches: Array, removed: Array, query: Array, gallery: Array) -> Array:
        return count_ranks(matches, removed, distances.KINDS[kind](query, gallery))

    return count


def _rank_matches(
    rows_of: Any,
    function: Callable,
    shared: Sequence[Any],
    matches: _Lists,
    removed: _Lists,
    num_gallery: int,
    block_size: int | None,
    devices: Sequence[jax.Device] | None,
) -> Int64[np.ndarray, "P"]:
    """Ranks in the order of `matches.indices`."""
    mapped = blocks.BlockMap(function, shared, devices=devices)
    step = blocks.choose_block(num_gallery, block_size, multiple=_ROWS) * mapped.num_devices
    # Queries with equally many matches go together: a block costs as much as its longest list.
    order = np.argsort(-matches.lengths, kind="stable")
    order = order[: np.count_nonzero(matches.lengths)]

    def start(begin: int) -> tuple[np.ndarray, Any]:
        rows = order[begin : begin + step]
        padded = blocks.pad_rows(rows, step)
        values = blocks.pad_rows(rows_of(rows), step)
        return rows, mapped(matches.pad(padded), removed.pad(padded), values)

    ranks = np.empty(len(matches.indices), np.int64)
    for rows, block in blocks.run_ahead(start(b) for b in range(0, len(order), step)):
        lengths = matches.lengths[rows]
        row, column = ragged_positions(lengths)
        ranks[np.repeat(matches.starts[rows], lengths) + column] = block[row, column]
    return ranks


def _check_labels(
    query_pids: Numbers,
    gallery_pids: Numbers,
    query_camids: Numbers,
    gallery_camids: Numbers,
    num_query: int,
    num_gallery: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        check_ids(query_pids, "query_pids", num_query),
        check_ids(gallery_pids, "gallery_pids", num_gallery),
        check_ids(query_camids, "query_camids", num_query),
        check_ids(gallery_camids, "gallery_camids", num_gallery),
    )


def _explain_no_match(
    query_pids: np.ndarray, gallery_pids: np.ndarray, query_camids: np.ndarray, removed: _Lists
) -> str:
    """Why no query is valid."""
    start = f"none of the {len(query_pids)} queries has a true match in the gallery: "
    if len(gallery_pids) == 0:
        return start + "every gallery image is junk"
    if not np.isin(query_pids, gallery_pids).any():
        return start + (
            f"no query pid (e.g. {query_pids[0]}) is among the gallery pids "
            f"(e.g. {gallery_pids[0]})"
        )
    if len(removed.indices):
        cameras = np.unique(query_camids)
        seen = f"all queries have camera {cameras[0]}" if len(cameras) == 1 else "by camera"
        return start + (
            f"all {len(removed.indices)} images of the same pid are from the query's own camera "
            f"and so are removed ({seen}). Check the camids: one camera cannot be evaluated"
        )
    return start + "all query pids mean junk or distractor"


def _summarise(
    ranks: np.ndarray,
    matches: _Lists,
    query_pids: np.ndarray,
    ap: str,
    max_rank: int,
    protocol: dict[str, Any],
) -> Result:
    """Metrics in float64 from the ranks of all matches."""
    lengths = matches.lengths
    row, position = ragged_positions(lengths)
    ranks = ranks[np.lexsort((ranks, row))]
    i = position + 1.0
    precision = i / ranks
    if ap == "trapezoid":
        # The Market-1501 rule: the precision just before the match counts half; 1 at rank 1.
        before = np.where(ranks == 1, 1.0, (i - 1) / np.maximum(ranks - 1, 1))
        precision = (precision + before) / 2
    valid = np.flatnonzero(lengths)
    per_query = np.bincount(row, precision, minlength=len(lengths))[valid] / lengths[valid]
    last = matches.starts[valid + 1] - 1
    first_match_rank = ranks[matches.starts[valid]]
    inp = lengths[valid] / ranks[last]
    counts = np.bincount(np.minimum(first_match_rank, max_rank + 1), minlength=max_rank + 2)
    return Result(
        mAP=float(per_query.mean()),
        mINP=float(inp.mean()),
        cmc=np.cumsum(counts[1 : max_rank + 1]) / len(valid),
        ap=per_query,
        inp=inp,
        first_match_rank=first_match_rank,
        valid_queries=valid,
        invalid_queries=np.flatnonzero(lengths == 0),
        query_pids=query_pids[valid],
        protocol=protocol | {"num_valid_queries": len(valid)},
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
    labels = _check_labels(
        query_pids, gallery_pids, query_camids, gallery_camids, matrix.shape[0], matrix.shape[1]
    )
    kept = np.flatnonzero(labels[1] != junk_pid) if junk_pid is not None else None
    if kept is None or len(kept) == matrix.shape[1]:
        kept = np.arange(matrix.shape[1])
        columns: Any = slice(None)
    else:
        columns = kept
    q_pids, g_pids, q_cams, g_cams = labels[0], labels[1][kept], labels[2], labels[3][kept]
    matches, removed = _split_lists(q_pids, g_pids, q_cams, g_cams, distractor_pid)
    if len(matches.indices) == 0:
        raise ValueError(_explain_no_match(q_pids, g_pids, q_cams, removed))

    def rows_of(rows: np.ndarray) -> np.ndarray:
        block = matrix[rows]
        # A NaN is before and after nothing: it would only make the ranks better, silently.
        bad = np.isnan(np.asarray(block).sum(1)) & np.isnan(np.asarray(block)).any(1)
        if bad.any():
            raise ValueError(f"distance holds NaN, e.g. in row {rows[np.argmax(bad)]}")
        return block if isinstance(columns, slice) else block[:, columns]

    with jax.enable_x64(matrix.dtype == np.float64):
        ranks = _rank_matches(
            rows_of, count_ranks, (), matches, removed, len(kept), block_size, devices
        )
    described = {
        "metric": "given distances",
        "ap": ap,
        "max_rank": max_rank,
        "num_query": matrix.shape[0],
        "num_gallery": len(kept),
        "num_junk": matrix.shape[1] - len(kept),
        "junk_pid": junk_pid,
        "distractor_pid": distractor_pid,
        "rerank": None,
    }
    return _summarise(ranks, matches, q_pids, ap, max_rank, described | dict(protocol or {}))


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
        block_size: queries in a block on one device; default as many as make 64 MiB of distances.
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
    labels = _check_labels(
        query_pids, gallery_pids, query_camids, gallery_camids, len(query), len(gallery)
    )
    options = dict(rerank_options or {})
    kept = np.arange(len(gallery)) if junk_pid is None else np.flatnonzero(labels[1] != junk_pid)
    num_junk = len(gallery) - len(kept)
    q_pids, g_pids, q_cams, g_cams = labels[0], labels[1][kept], labels[2], labels[3][kept]
    matches, removed = _split_lists(q_pids, g_pids, q_cams, g_cams, distractor_pid)
    if len(matches.indices) == 0:
        raise ValueError(_explain_no_match(q_pids, g_pids, q_cams, removed))
    if num_junk and not (keep_junk and rerank):
        gallery = gallery[kept]
    described = {
        "metric": metric,
        "normalize": normalize,
        "ap": ap,
        "max_rank": max_rank,
        "num_query": len(query),
        "num_gallery": len(kept),
        "num_junk": num_junk,
        "junk": "kept for re-ranking" if keep_junk else "dropped",
        "junk_pid": junk_pid,
        "distractor_pid": distractor_pid,
        "rerank": rerank,
        "rerank_options": None,
    }
    if rerank is None:
        ranks = _rank_matches(
            lambda rows: query[rows],
            _count_from_features(distances.choose_kind(metric, normalize)),
            [gallery],
            matches,
            removed,
            len(gallery),
            block_size,
            devices,
        )
    else:
        described["rerank_options"] = reranking.describe(rerank, options)
        prepare = reranking.METHODS[rerank]
        reranked = prepare(query, gallery, block_size=block_size, devices=devices, **options)
        columns = kept if num_junk and keep_junk else slice(None)
        ranks = _rank_matches(
            lambda rows: reranked(rows)[:, columns].astype(np.float32),
            count_ranks,
            (),
            matches,
            removed,
            len(kept),
            block_size,
            devices,
        )
    return _summarise(ranks, matches, q_pids, ap, max_rank, described | dict(protocol or {}))

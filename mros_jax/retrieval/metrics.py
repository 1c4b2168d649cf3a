"""CMC, mAP and mINP from ranks that are counted, never sorted.

The metrics need only the ranks of the true matches of a query, and the rank of a match is one more
than the number of gallery images before it. Counting those in the block of distances that was just
computed needs O(block x gallery) memory and no sort of the gallery.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64, Int, Int64, Shaped

from mros_jax.errors import UserError, check_choice
from mros_jax.retrieval import blocks, distances, gathers
from mros_jax.retrieval.inputs import (
    Numbers,
    check_count,
    check_matrix,
    check_pair,
)
from mros_jax.retrieval.labels import Labels, Side, check_labels, make_sides, ragged_positions
from mros_jax.retrieval.rerank import Rerank, parse

AP_VARIANTS = ("standard", "trapezoid")
_SHORT = 100_000  # gallery images; NumPy's calls for fewer end so soon that threads only wait
_MANY = 4000  # marks in a row
_MASK = 2**19  # bytes that mark what comes before some matches


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
            UserError: entries are missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise UserError(f"this result lacks {', '.join(missing)}")
        whole = ("first_match_rank", "valid_queries", "invalid_queries", "query_pids")
        fields: dict[str, Any] = {name: values[name] for name in names}
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = np.asarray(value, np.int64 if name in whole else np.float64)
        return cls(**fields)

    def rank(self, k: int) -> float | None:
        """Rank-k, or None where the CMC curve was not computed that far."""
        check_count(k, "k")
        return float(self.cmc[k - 1]) if k <= len(self.cmc) else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, as results.json holds it."""
        values = dataclasses.asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        values = {"mAP": self.mAP, "mINP": self.mINP}
        values |= {f"Rank-{k}": self.cmc[k - 1] for k in (1, 5, 10) if k <= len(self.cmc)}
        return "  ".join(f"{name} {100 * value:.2f}" for name, value in values.items())


def count_ranks(
    distance: Shaped[Array, "B G"], matches: Int[Array, "B M"], removed: Int[Array, "B R"]
) -> Int[Array, "B M"]:
    """Rank (from 1) of each match among the kept gallery images, on a device.

    Equal distances are ordered by gallery index, as a stable sort orders them. An image is never
    before itself. In the lists -1 is padding.
    """
    column = jnp.arange(distance.shape[1])
    d_match = jnp.take_along_axis(distance, matches, axis=1)  # (B, M)
    d_gone = jnp.take_along_axis(distance, removed, axis=1)  # (B, R)

    def count_one(i: Array, ranks: Array) -> Array:
        at, index = d_match[:, i, None], matches[:, i, None]

        def comes_before(d: Array, place: Array) -> Array:
            return (place != index) & ((d < at) | ((d == at) & (place < index)))

        before = comes_before(distance, column)
        gone_before = (removed >= 0) & comes_before(d_gone, removed)
        rank = 1 + before.sum(1, dtype=jnp.int32) - gone_before.sum(1, dtype=jnp.int32)
        return ranks.at[:, i].set(rank)

    most = (matches >= 0).sum(1).max()
    ranks: Array = jax.lax.fori_loop(0, most, count_one, jnp.zeros(matches.shape, jnp.int32))
    return ranks


def count_on_host(
    distance: Shaped[np.ndarray, "B G"],
    rows: Int[np.ndarray, "B"],
    labels: Labels,
    groups: Int[np.ndarray, "G"] | None = None,
) -> Int64[np.ndarray, "K"]:
    """`count_ranks` in memory: quicker on a processor, and without lists to pad.

    Args:
        distance: of these queries to the gallery images that `labels` keeps.
        rows: which queries they are.
        labels: of all queries.
        groups: count only images of the match's own group.

    Returns:
        Ranks of the matches, in the order of `labels.matches.cells(rows)`.
    """
    near = np.empty(distance.shape[1], bool)
    before = np.empty(max(_MASK, len(near)), bool)  # in a core's cache
    ranks = [np.empty(0, np.int64)]
    for source, query in zip(distance, rows, strict=True):
        matches = labels.matches.of(query)
        if not len(matches):
            continue
        np.less_equal(source, source[matches].max(), out=near)  # others come before no match
        near[labels.removed.of(query)] = False
        (columns,) = near.nonzero()
        row, places = source[columns], columns.searchsorted(matches)
        step = len(before) // len(columns)
        for i in range(0, len(places), step):
            some = places[i : i + step]
            marks = before[: len(some) * len(columns)].reshape(len(some), -1)
            _mark_before(row, some, marks)
            if groups is not None:
                own = groups[columns]
                marks &= own == own[some, None]
            ranks.append(_count_marks(marks))
    return 1 + np.concatenate(ranks)


def _count_marks(marks: Bool[np.ndarray, "M G"]) -> Int64[np.ndarray, "M"]:
    """How many are marked in each row."""
    if marks.shape[1] < _MANY:
        counts: np.ndarray = marks.sum(1, dtype=np.int32).astype(np.int64)
        return counts
    # NumPy's count takes longer to begin, and then is quicker.
    return np.array([np.count_nonzero(line) for line in marks], np.int64)


def _mark_before(
    row: Shaped[np.ndarray, "G"], places: Int64[np.ndarray, "M"], before: Bool[np.ndarray, "M G"]
) -> None:
    """Mark which images of a row come before each of those at some places, which rise."""
    at = row[places, None]
    first, last = places[0], places[-1]
    # Equal ones left of the first place come before, those right of the last do not.
    np.less_equal(row[:first], at, out=before[:, :first])
    np.less(row[first:], at, out=before[:, first:])
    equal = row[first:last] == at
    if np.count_nonzero(equal) >= len(places):  # each place but the last is equal to itself
        before[:, first:last] |= equal & (np.arange(first, last) < places[:, None])


def _check_distances(distance: Shaped[np.ndarray, "B G"], rows: Int[np.ndarray, "B"]) -> None:
    """Refuse NaN, infinity, and numbers so small that compilers may take them for 0."""
    info = np.finfo(distance.dtype)
    lowest, infinite = np.array([info.tiny, np.inf], info.dtype).view(f"u{info.bits // 8}")
    for source, query in zip(distance, rows, strict=True):
        size = np.abs(source).view(lowest.dtype)
        if size.max() >= infinite or (size - 1 < lowest - 1).any():  # 0 - 1 is the largest
            raise UserError(
                "distance holds NaN, infinity or numbers that are not 0 but too small for their "
                f"type, e.g. in row {query}: they have no place in a ranking"
            )


def _rank_given(
    rows_of: Callable[[np.ndarray], Any],
    labels: Labels,
    placement: blocks.Placement,
    *,
    threads: int = blocks.THREADS,
) -> Int64[np.ndarray, "P"]:
    """Ranks of all matches, in the order of `labels.matches.indices`, from rows of distances.

    `threads`: see `blocks.map_on_host`.
    """

    def rank(rows: np.ndarray) -> np.ndarray:
        distance = rows_of(rows)
        _check_distances(distance, rows)
        return count_on_host(distance, rows, labels)

    rows = np.flatnonzero(labels.matches.lengths)
    step = blocks.choose_block(len(labels.kept), block_size=placement.block_size)
    parts = [rows[i : i + step] for i in range(0, len(rows), step)]
    return np.concatenate(blocks.map_on_host(rank, parts, placement, threads=threads))


Run = Callable[[int, Callable[[slice], Sequence[Any]]], Iterator[tuple[slice, Any]]]


def _rank_on_devices(
    run: Run, rows_of: Callable[[np.ndarray], Any], labels: Labels
) -> Int64[np.ndarray, "P"]:
    """The same from `count_ranks` of blocks; only ranks leave the devices."""
    matches, removed = labels.matches, labels.removed
    # Queries with equally many matches go together: rows cost as much as the longest list of them.
    order = np.argsort(-matches.lengths, kind="stable")
    order = order[: np.count_nonzero(matches.lengths)]

    def get(part: slice) -> tuple[Any, ...]:
        rows = order[part]
        return rows_of(rows), matches.pad(rows), removed.pad(rows)

    ranks = np.empty(len(matches.indices), np.int64)
    for part, block in run(len(order), get):
        rows = order[part]
        ranks[matches.places(rows)] = block[ragged_positions(matches.lengths[rows])]
    return ranks


def _rank_in_memory(
    compared: distances.Gallery,
    query: Float32[np.ndarray | Array, "Q D"],
    labels: Labels,
) -> Int64[np.ndarray, "P"]:
    """The same from descriptors: a block is counted while the next one is computed."""
    rows = np.flatnonzero(labels.matches.lengths)
    found = compared.run(
        len(rows),
        lambda part: [blocks.take_rows(query, rows[part])],
        lambda part, block: count_on_host(block, rows[part], labels),
    )
    return np.concatenate([ranks for _, ranks in found])


def rank_by_group(
    distance: Shaped[np.ndarray, "B G"],
    rows: Int[np.ndarray, "B"],
    labels: Labels,
    groups: Int[np.ndarray, "G"],
) -> tuple[Int64[np.ndarray, "K"], Int64[np.ndarray, "K"]]:
    """Ranks of the matches of some queries, among all and among images of the match's group.

    Args:
        distance: of these queries to the gallery images that `labels` keeps.
        rows: which queries they are.
        labels: of all queries.
        groups: (G,) whole numbers, e.g. which camera took each of those images.

    Returns:
        Both in the order of `labels.matches.cells(rows)`.

    Raises:
        UserError: NaN or infinite distances.
    """
    _check_distances(distance, rows)
    return (
        count_on_host(distance, rows, labels),
        count_on_host(distance, rows, labels, groups),
    )


def average_precisions(
    ranks: Int64[np.ndarray, "P"], lists: Int64[np.ndarray, "P"], num_lists: int, ap: str
) -> Float64[np.ndarray, "num_lists"]:
    """Average precision of many ranked lists from the ranks of their matches.

    With ranks r_1 < ... < r_n the average precision is the mean of i / r_i ("standard"), or of the
    means of that and (i - 1) / (r_i - 1), which is 1 at rank 1 ("trapezoid", the Market-1501 code).

    Args:
        ranks: of the matches, from 1, in any order.
        lists: which list each belongs to.
        num_lists: lists without a match get NaN.
        ap: "standard" or "trapezoid".
    """
    order = np.lexsort((ranks, lists))
    ranks, lists = ranks[order], lists[order]
    lengths = np.bincount(lists, minlength=num_lists)
    i = ragged_positions(lengths)[1] + 1.0
    precision = i / ranks
    if ap == "trapezoid":
        before = np.where(ranks == 1, 1.0, (i - 1) / np.maximum(ranks - 1, 1))
        precision = (precision + before) / 2
    sums = np.bincount(lists, precision, minlength=num_lists)
    means: np.ndarray = np.divide(sums, lengths, out=np.full(num_lists, np.nan), where=lengths > 0)
    return means


def _summarize(
    ranks: Int64[np.ndarray, "P"],
    labels: Labels,
    ap: str,
    max_rank: int,
    protocol: dict[str, Any],
) -> Result:
    """Metrics in float64 from the ranks of all matches."""
    lengths, starts = labels.matches.lengths, labels.matches.starts
    row, _ = ragged_positions(lengths)
    valid = np.flatnonzero(lengths)
    ranks = ranks[np.lexsort((ranks, row))]
    _check_ranks(ranks, row, len(labels.kept))
    per_query = average_precisions(ranks, row, len(lengths), ap)[valid]
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


def _check_ranks(
    ranks: Int64[np.ndarray, "P"], row: Int64[np.ndarray, "P"], num_gallery: int
) -> None:
    """Ranks of a query, in order, rise from at least 1 to at most the gallery's size.

    Every metric is between 0 and 1 then.

    Raises:
        RuntimeError: they do not, which is a bug here or in what computed them.
    """
    same_query = row[1:] == row[:-1]
    rising = (ranks[1:] > ranks[:-1]) | ~same_query
    if ranks.min() < 1 or ranks.max() > num_gallery or not rising.all():
        raise RuntimeError(
            f"internal error: ranks {ranks.min()}..{ranks.max()} of {num_gallery} gallery images, "
            f"{(~rising).sum()} of them twice in one query; please report this"
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
    placement: blocks.Placement = blocks.EVERYWHERE,
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
        placement: devices and block size.

    Raises:
        UserError: NaN or infinite distances, wrong shapes, labels that are no whole numbers, no
            valid query.
    """
    check_choice("ap", ap, AP_VARIANTS)
    check_count(max_rank, "max_rank")
    matrix = np.asarray(check_matrix(distance))
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
        part = matrix[blocks.narrow(rows)]
        return np.take(part, labels.kept, axis=1) if labels.num_junk else part

    threads = 1 if matrix.shape[1] < _SHORT else blocks.THREADS
    ranks = _rank_given(rows_of, labels, placement, threads=threads)
    described = {
        "metric": "given distances",
        "rerank": None,
        "junk_pid": junk_pid,
        "distractor_pid": distractor_pid,
    }
    return _summarize(ranks, labels, ap, max_rank, described | dict(protocol or {}))


def evaluate(
    *data: Side | Numbers,
    metric: str = "cosine",
    ap: str = "standard",
    max_rank: int = 50,
    rerank: Rerank | str | None = None,
    normalize: bool = True,
    keep_junk: bool = False,
    junk_pid: int | None = -1,
    distractor_pid: int | None = 0,
    protocol: Mapping[str, Any] | None = None,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Result:
    """CMC, mAP and mINP of descriptors by the Market-1501 protocol (single query).

    Junk never counts; distractors stay in the gallery and never match; images of the query's own
    pid *and* camera are removed from its ranking, and nothing else is. A query without a match is
    left out of every mean and reported. Equal distances are ordered by gallery index. Distances
    are float32 (products at the highest precision); average precisions are summed in float64.

    Args:
        *data: queries and gallery as two `Side`; or six arrays: query_features (Q, D) and
            gallery_features (G, D), numbers of any type; query_pids (Q,) and gallery_pids (G,),
            identities; query_camids (Q,) and gallery_camids (G,), cameras; whole numbers.
        metric: "cosine" or "euclidean".
        ap: "standard" (mean of i / r_i, as fast-reid, torchreid and the strong baseline) or
            "trapezoid" (the Market-1501 MATLAB code; lower by up to 1 point of mAP).
        max_rank: length of the CMC curve.
        rerank: a method with its parameters, as `ECN(k=20)`, or its name, "ecn", "k_reciprocal" or
            "aqe", for the usual ones (see `mros_jax.retrieval.rerank`); or a learned one with the
            heads that it needs, as `GSRW().bind(arrays)`.
        normalize: divide descriptors by their norm first. Re-ranking always does, and a learned one
            never. Unnormalised "cosine" ranks by the inner product.
        keep_junk: let junk images take part in re-ranking as neighbours. They never count.
        junk_pid: pid of junk images; None if there are none.
        distractor_pid: pid that never matches; None where 0 is a person like others.
        protocol: further entries for the result's protocol, e.g. the data set's name.
        placement: devices and block size.

    Returns:
        A `Result`.

    Raises:
        UserError: NaN or zero features (their rows are named), mismatched lengths, labels that
            are no whole numbers, no valid query (and why), lists longer than the gallery.

    Example:
        >>> features = np.eye(4, dtype=np.float32)
        >>> query = Side(features[:1], [7], [1])
        >>> evaluate(query, Side(features[:2], [7, 8], [2, 2])).mAP
        1.0
    """
    query_side, gallery_side = make_sides(data)
    check_choice("metric", metric, distances.METRICS)
    check_choice("ap", ap, AP_VARIANTS)
    check_count(max_rank, "max_rank")
    if isinstance(rerank, str):
        (rerank,) = parse([rerank])
    sides = query_side.features, gallery_side.features
    if rerank is None:
        query, gallery, _ = check_pair(*sides, normalize=normalize)
    else:
        query, gallery = rerank.check_features(*sides)
        if rerank.learned:
            metric, normalize = "euclidean", False
    labels = check_labels(
        query_side.pids,
        gallery_side.pids,
        query_side.camids,
        gallery_side.camids,
        len(query),
        len(gallery),
        junk_pid=junk_pid,
        distractor_pid=distractor_pid,
    )
    keep_junk = keep_junk and rerank is not None
    if labels.num_junk and not keep_junk:
        gallery = blocks.take_rows(gallery, labels.kept)
    described = {
        "metric": metric,
        "normalize": normalize,
        "rerank": None if rerank is None else rerank.name,
        "rerank_options": None if rerank is None else rerank.describe(),
        "junk": "neighbours in re-ranking" if keep_junk else "dropped",
        "junk_pid": junk_pid,
        "distractor_pid": distractor_pid,
    }
    if rerank is None:
        kind = distances.choose_kind(metric, normalize)
        if placement.is_host():
            compared = distances.Gallery(gallery, kind, placement=placement)
            ranks = _rank_in_memory(compared, query, labels)
        else:
            compared = distances.Gallery(gallery, kind, look=count_ranks, placement=placement)
            ranks = _rank_on_devices(compared.run, lambda rows: query[rows], labels)
    else:
        write = rerank.prepare(query, gallery, placement)
        columns = labels.kept if keep_junk else np.arange(len(gallery))
        if isinstance(write, gathers.DeviceRows):
            run = write.look_at(count_ranks, columns)
            ranks = _rank_on_devices(run, lambda rows: rows.astype(np.int32), labels)
        else:

            def rows_of(rows: np.ndarray) -> np.ndarray:
                block = np.empty((len(rows), len(gallery)), np.float32)
                write(rows, block)
                return block[:, columns] if keep_junk else block

            ranks = _rank_given(rows_of, labels, placement)
    return _summarize(ranks, labels, ap, max_rank, described | dict(protocol or {}))

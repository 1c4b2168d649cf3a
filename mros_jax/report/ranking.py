"""Ranked lists, distances and camera pairs, computed again from a run's descriptors."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped

from mros_jax.errors import UserError
from mros_jax.models.outputs import Part
from mros_jax.retrieval import compute_distances, rerank

Status = Literal["match", "wrong", "distractor", "junk"]
_BLOCK = 512  # queries at a time: 80 MB of distances at Market-1501's size
_SAMPLES = 300_000  # distances of different identities that are kept for the histogram


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image in a ranked list.

    Attributes:
        index: row of the gallery.
        rank: its place from 1; None if it does not count.
        distance: to the query, of the ranking that the list shows.
        status: "match", "wrong", "distractor", or "junk": not counted, because it is a junk image
            or shows the query's identity in the query's camera.
    """

    index: int
    rank: int | None
    distance: float
    status: Status


@dataclasses.dataclass(frozen=True)
class Scan:
    """What one pass over all queries gathers.

    Attributes:
        ap: (Q,) average precision; NaN where a query has no match.
        cameras: the (query camera, gallery camera) axes of the following.
        pair_ap: (Cq, Cg) mAP of the queries of one camera in the gallery of another; NaN: none.
        pair_rank1: (Cq, Cg) their Rank-1.
        pair_queries: (Cq, Cg) valid queries.
        same: distances of all true matches.
        different: distances of other identities, a random sample.
    """

    ap: np.ndarray
    cameras: tuple[np.ndarray, np.ndarray]
    pair_ap: np.ndarray
    pair_rank1: np.ndarray
    pair_queries: np.ndarray
    same: np.ndarray
    different: np.ndarray


class Ranking:
    """Distances of one ranking of a run, row by row, and which gallery images count.

    Args:
        features: the arrays of `features.npz`.
        result: one entry of `results.json`'s "results": its protocol is applied.
    """

    def __init__(self, features: Mapping[str, np.ndarray], result: Mapping[str, Any]):
        self.name = result["name"]
        self._protocol = protocol = result["protocol"]
        self._arrays = features
        gallery, pids = features["gallery_features"], features["gallery_pids"]
        self.junk = pids == protocol["junk_pid"]
        # Junk may have been left out of the re-ranking: it changes the neighbourhoods.
        dropped = result["rerank"] is not None and protocol["junk"] == "dropped"
        self._columns = np.flatnonzero(~self.junk) if dropped else np.arange(len(pids))
        self._gallery = gallery[self._columns] if dropped and self.junk.any() else gallery
        self._write = None
        if result["rerank"] is not None:
            options = dict(protocol["rerank_options"] or {})
            options.pop("neighbors", None)
            prepare = rerank.METHODS[result["rerank"]]
            self._write = prepare(features["query_features"], self._gallery, **options)

    def rows(self, queries: np.ndarray) -> Float[np.ndarray, "B G"]:
        """Distances of some queries; NaN where junk took no part."""
        result = np.full((len(queries), len(self.junk)), np.nan)
        if self._write is None:
            result[:, self._columns] = compute_distances(
                self._arrays["query_features"][queries],
                self._gallery,
                metric=self._protocol["metric"],
                normalize=self._protocol["normalize"],
            )
        else:
            block = np.empty((len(queries), len(self._columns)))
            self._write(queries, block)
            result[:, self._columns] = block
        return result

    def masks(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """(G,) which images count in a query's ranking, and which of them match."""
        same = self._arrays["gallery_pids"] == self._arrays["query_pids"][query]
        same_camera = self._arrays["gallery_camids"] == self._arrays["query_camids"][query]
        counted = ~self.junk & ~(same & same_camera)
        if self._arrays["query_pids"][query] == self._protocol["distractor_pid"]:
            same = np.zeros_like(same)
        return counted, counted & same

    def list_top(
        self, query: int, row: Shaped[np.ndarray, "G"], top: int, most_junk: int = 5
    ) -> list[Entry]:
        """The first `top` places of a query, and up to `most_junk` uncounted images among them."""
        counted, matches = self.masks(query)
        distractor = self._arrays["gallery_pids"] == self._protocol["distractor_pid"]
        entries: list[Entry] = []
        rank = skipped = 0
        for index in np.argsort(row, kind="stable"):  # NaN comes last
            if rank == top or np.isnan(row[index]):
                break
            if not counted[index]:
                if skipped < most_junk:
                    entries.append(Entry(int(index), None, float(row[index]), "junk"))
                skipped += 1
                continue
            rank += 1
            status: Status = "distractor" if distractor[index] else "wrong"
            if matches[index]:
                status = "match"
            entries.append(Entry(int(index), rank, float(row[index]), status))
        return entries

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        num_query = len(self._arrays["query_pids"])
        for start in range(0, num_query, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, num_query))
            yield from zip(rows.tolist(), self.rows(rows), strict=True)

    def scan(self, seed: int = 0) -> Scan:
        """Rank every query, in the whole gallery and in that of each camera."""
        arrays, rng = self._arrays, np.random.default_rng(seed)
        num_query = len(arrays["query_pids"])
        per_query = -(-_SAMPLES // num_query)
        query_cams, query_at = np.unique(arrays["query_camids"], return_inverse=True)
        gallery_cams, gallery_at = np.unique(arrays["gallery_camids"], return_inverse=True)
        shape = (len(query_cams), len(gallery_cams))
        total_ap, total_first, counts = np.zeros(shape), np.zeros(shape), np.zeros(shape, int)
        ap = np.full(num_query, np.nan)
        same, different = [], []
        for query, row in self._blocks():
            counted, matches = self.masks(query)
            others = row[counted & ~matches]
            different.append(others if len(others) <= per_query else rng.choice(others, per_query))
            if not matches.any():
                continue
            same.append(row[matches])
            order = np.flatnonzero(counted)
            order = order[np.argsort(row[order], kind="stable")]
            hits, camera = matches[order], gallery_at[order]
            ap[query] = average_precision(hits, self._protocol["ap"])
            for c in np.unique(camera[hits]):
                own = hits[camera == c]
                at = query_at[query], c
                total_ap[at] += average_precision(own, self._protocol["ap"])
                total_first[at] += own[0]
                counts[at] += 1
        divisor = np.where(counts, counts, np.nan)
        return Scan(
            ap=ap,
            cameras=(query_cams, gallery_cams),
            pair_ap=total_ap / divisor,
            pair_rank1=total_first / divisor,
            pair_queries=counts,
            same=np.concatenate(same) if same else np.zeros(0),
            different=np.concatenate(different),
        )


def average_precision(hits: Shaped[np.ndarray, "G"], variant: str) -> float:
    """AP of a ranking, given in order as match or not: "standard" or "trapezoid"."""
    ranks = np.flatnonzero(hits) + 1
    i = np.arange(1, len(ranks) + 1)
    precision = i / ranks
    if variant == "trapezoid":
        before = np.where(ranks == 1, 1.0, (i - 1) / np.maximum(ranks - 1, 1))
        precision = (precision + before) / 2
    return float(precision.mean())


def choose_queries(
    result: Mapping[str, Any], count: int, seed: int = 0
) -> dict[str, list[tuple[int, float, int]]]:
    """Best, worst and random queries by average precision, each of another identity if possible.

    Args:
        result: the plain entry of `results.json`'s "results".
        count: queries of each kind.
        seed: draws the random ones.

    Returns:
        kind -> (query index, average precision, rank of the first match).
    """
    ap = np.asarray(result["ap"])
    # Among equals the later first match is the worse query.
    order = np.lexsort((np.asarray(result["first_match_rank"]), -ap)).tolist()
    shuffled = np.random.default_rng(seed).permutation(len(ap)).tolist()
    chosen: dict[str, list[int]] = {}
    taken: set[int] = set()
    for kind, candidates in (("best", order), ("worst", order[::-1]), ("random", shuffled)):
        pids: set[int] = set()
        picks: list[int] = []
        left = [i for i in candidates if i not in taken]
        fresh = []
        for i in left:
            if result["query_pids"][i] not in pids:
                pids.add(result["query_pids"][i])
                fresh.append(i)
        for i in (*fresh, *left):
            if len(picks) < count and i not in picks:
                picks.append(i)
        chosen[kind] = picks
        taken.update(picks)
    return {
        kind: [
            (result["valid_queries"][i], float(ap[i]), int(result["first_match_rank"][i]))
            for i in picks
        ]
        for kind, picks in chosen.items()
    }


def split_distance(
    query: Shaped[np.ndarray, "D"], gallery: Shaped[np.ndarray, "D"], parts: Sequence[Part]
) -> dict[str, list[float]]:
    """What each part of the descriptor adds to the cosine distance of two of them.

    The cosine distance of unit vectors a and b is |a - b|^2 / 2, a sum over their entries, and the
    descriptor is the concatenation of its parts: the sum over the parts is the distance, exactly.

    Args:
        query: a descriptor.
        gallery: a descriptor.
        parts: what they are made of, in order.

    Returns:
        group -> what its parts add, in order, all >= 0.

    Raises:
        UserError: the descriptor has another length than the parts together.
    """
    if sum(part.size for part in parts) != len(query):
        sizes = [part.size for part in parts]
        raise UserError(f"a descriptor of {len(query)} numbers does not consist of parts {sizes}")
    a, b = (np.asarray(x, np.float64) for x in (query, gallery))
    entries = np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)) / 2
    sums = np.add.reduceat(entries, np.cumsum([0, *(part.size for part in parts[:-1])]))
    result: dict[str, list[float]] = {}
    for part, value in zip(parts, sums, strict=True):
        result.setdefault(part.group, []).append(float(value))
    return result

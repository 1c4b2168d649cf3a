"""Ranked lists, distances and camera pairs, computed again from a run's descriptors."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Shaped

from mros_jax.retrieval import compute_distances, rerank
from mros_jax.retrieval.distances import prepare_distances
from mros_jax.retrieval.labels import check_labels, ragged_positions
from mros_jax.retrieval.metrics import average_precisions, rank_by_group

Status = Literal["match", "wrong", "distractor", "junk", "unknown"]
_BLOCK = 2**23  # distances at a time: 32 MiB
SHORTLIST = 1000  # images that a descriptor which is none of the run's is re-ranked among
_SAMPLES = 300_000  # distances of each kind that are kept for the histogram


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image in a ranked list.

    Attributes:
        index: row of the gallery.
        rank: its place from 1; None if it does not count.
        distance: to the query, of the ranking that the list shows.
        status: "match", "wrong", "distractor", or "junk": not counted, because it is a junk image
            or shows the query's identity in the query's camera; "unknown" where nobody says who
            the query is.
        reason: why it does not count, "junk" or "own camera"; empty if it does.
    """

    index: int
    rank: int | None
    distance: float
    status: Status
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Scores of the queries of one camera in the gallery of another, for pairs that have some.

    Attributes:
        query_camids: (P,) camera of the queries.
        gallery_camids: (P,) camera of the gallery images.
        queries: (P,) queries with a match there.
        mAP: (P,) over these.
        rank1: (P,) over these.
    """

    query_camids: np.ndarray
    gallery_camids: np.ndarray
    queries: np.ndarray
    mAP: np.ndarray
    rank1: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scan:
    """What one pass over all queries gathers.

    Attributes:
        ap: (Q,) average precision; NaN where a query has no match.
        pairs: scores by pairs of cameras.
        same: distances of true matches, all or a random sample.
        different: distances of other identities, a random sample.
    """

    ap: np.ndarray
    pairs: Pairs
    same: np.ndarray
    different: np.ndarray


@dataclasses.dataclass(frozen=True)
class HardPairs:
    """Of each query its hardest pair of a kind, the hardest first.

    Attributes:
        queries: (P,) rows of queries.
        gallery: (P,) rows of the gallery.
        distances: (P,) between them.
    """

    queries: np.ndarray
    gallery: np.ndarray
    distances: np.ndarray


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
        self._labels = check_labels(
            features["query_pids"],
            pids,
            features["query_camids"],
            features["gallery_camids"],
            len(features["query_features"]),
            len(pids),
            junk_pid=protocol["junk_pid"],
            distractor_pid=protocol["distractor_pid"],
        )
        # Junk may have been left out of the re-ranking: it changes the neighbourhoods.
        dropped = result["rerank"] is not None and protocol["junk"] == "dropped"
        self._columns = self._labels.kept if dropped else np.arange(len(pids))
        self._gallery = gallery[self._columns] if self._labels.num_junk and dropped else gallery
        self._method: rerank.Rerank | None = None
        if result["rerank"] is None:
            self._compute = prepare_distances(
                features["query_features"],
                gallery,
                metric=protocol["metric"],
                normalize=protocol["normalize"],
            )
        else:
            options = dict(protocol["rerank_options"] or {})
            options.pop("neighbors", None)
            (method,) = rerank.parse([result["rerank"]], {result["rerank"]: options})
            self._method = method.bind(features)
            self._write = self._method.prepare(features["query_features"], self._gallery)

    def rows(self, queries: np.ndarray) -> Float[np.ndarray, "B G"]:
        """Distances of some queries; NaN where junk took no part."""
        if self._method is None:
            return self._compute(queries)
        block = np.empty((len(queries), len(self._columns)), np.float32)
        self._write(queries, block)
        if block.shape[1] == len(self._arrays["gallery_pids"]):
            return block
        return self._spread(block, self._columns)

    def compare(self, descriptor: Float[np.ndarray, "D"]) -> Float[np.ndarray, "G"]:
        """Distances of another descriptor; NaN where an image took no part.

        A re-ranking compares it with the `SHORTLIST` nearest images and these with each other, as
        neighbours in the whole gallery would have to be searched anew for each descriptor.

        Raises:
            UserError: it is of another length, or the gallery has fewer images than the
                re-ranking's parameters ask for.
        """
        query = descriptor[None]
        if self._method is None:
            metric, normalize = self._protocol["metric"], self._protocol["normalize"]
            block = compute_distances(query, self._gallery, metric=metric, normalize=normalize)
            return block.ravel()
        raw = self._method.learned
        metric = "euclidean" if raw else "cosine"
        plain = compute_distances(query, self._gallery, metric=metric, normalize=not raw)[0]
        near = np.argsort(plain, kind="stable")[:SHORTLIST]
        block = self._method.distances(query, self._gallery[near], dtype=np.float32)
        return self._spread(block, self._columns[near]).ravel()

    def _spread(
        self, block: Float[np.ndarray, "B C"], columns: np.ndarray
    ) -> Float[np.ndarray, "B G"]:
        """Distances to some gallery images as a block of all; NaN for the others."""
        result = np.full((len(block), len(self._arrays["gallery_pids"])), np.nan, np.float32)
        result[:, columns] = block
        return result

    def list_top(
        self, query: int | None, row: Shaped[np.ndarray, "G"], top: int, most_junk: int = 5
    ) -> list[Entry]:
        """The first `top` places of a query, and up to `most_junk` uncounted images among them.

        Args:
            query: its row; None: an image that is none of the run's.
            row: its distances.
            top: places to list.
            most_junk: uncounted images to list.
        """
        kept = np.zeros(len(row), bool)
        kept[self._labels.kept] = True
        counted = kept
        if query is not None:
            counted, matches = self._labels.mark(query)
        distractor = self._arrays["gallery_pids"] == self._protocol["distractor_pid"]
        entries: list[Entry] = []
        rank = skipped = 0
        for index in np.argsort(row, kind="stable"):  # NaN comes last
            if rank == top or np.isnan(row[index]):
                break
            if not counted[index]:
                if skipped < most_junk:
                    reason = "own camera" if kept[index] else "junk"
                    entries.append(Entry(int(index), None, float(row[index]), "junk", reason))
                skipped += 1
                continue
            rank += 1
            status: Status = "distractor" if distractor[index] else "wrong"
            if query is None:
                status = "unknown"
            elif matches[index]:
                status = "match"
            entries.append(Entry(int(index), rank, float(row[index]), status))
        return entries

    def _blocks(self) -> Iterator[tuple[np.ndarray, Float[np.ndarray, "B G"]]]:
        """Queries, and their distances to the gallery images that are not junk."""
        num_query, num_gallery = len(self._labels.query_pids), len(self._arrays["gallery_pids"])
        step = max(1, min(512, _BLOCK // num_gallery))
        for start in range(0, num_query, step):
            rows = np.arange(start, min(start + step, num_query))
            block = self.rows(rows)
            yield rows, block[:, self._labels.kept] if self._labels.num_junk else block

    def scan(self, seed: int = 0) -> Scan:
        """Rank every query, in the whole gallery and in that of each camera."""
        labels, rng = self._labels, np.random.default_rng(seed)
        num_query = len(labels.query_pids)
        cameras, camera = np.unique(labels.gallery_camids, return_inverse=True)
        camera = camera.astype(np.int32)
        ranks = np.empty(len(labels.matches.indices), np.int64)
        in_camera = np.empty_like(ranks)
        same, different = np.empty(len(ranks), np.float32), []
        for rows, block in self._blocks():
            places = labels.matches.places(rows)
            if len(places):
                ranks[places], in_camera[places] = rank_by_group(block, rows, labels, camera)
            matching = labels.matches.cells(rows)
            same[places] = block[matching]
            different.append(self._sample(rows, block, -(-_SAMPLES // num_query), rng))
        query, _ = ragged_positions(labels.matches.lengths)
        ap = self._protocol["ap"]
        return Scan(
            ap=average_precisions(ranks, query, num_query, ap),
            pairs=self._average_pairs(query, in_camera, cameras, camera),
            same=same if len(same) <= _SAMPLES else rng.choice(same, _SAMPLES, replace=False),
            different=np.concatenate(different),
        )

    def find_hard(self) -> tuple[HardPairs, HardPairs]:
        """Each query's nearest image of somebody else, and its farthest true match.

        Queries without one are left out. Distractors are somebody else.
        """
        labels = self._labels
        impostors: list[tuple[int, int, float]] = []
        mates: list[tuple[int, int, float]] = []
        for rows, block in self._blocks():
            row, column = labels.matches.cells(rows)
            if len(row):
                order = np.lexsort((block[row, column], row))
                last = order[np.flatnonzero(np.diff(row[order], append=-1))]
                own = column[last]
                found = rows[row[last]], labels.kept[own], block[row[last], own]
                mates += zip(*(part.tolist() for part in found), strict=True)
            others = block.copy()
            for lists in (labels.matches, labels.removed):
                others[lists.cells(rows)] = np.inf
            nearest = others.argmin(1)
            distance = others[np.arange(len(rows)), nearest]
            some = np.isfinite(distance)
            found = rows[some], labels.kept[nearest[some]], distance[some]
            impostors += zip(*(part.tolist() for part in found), strict=True)
        impostors.sort(key=lambda pair: pair[2])
        mates.sort(key=lambda pair: -pair[2])
        return _gather(impostors), _gather(mates)

    def _sample(
        self,
        rows: np.ndarray,
        block: Float[np.ndarray, "B G"],
        count: int,
        rng: np.random.Generator,
    ) -> Float32[np.ndarray, "S"]:
        """Distances to other identities, about `count` a query."""
        other = np.ones(block.shape, bool)
        for lists in (self._labels.matches, self._labels.removed):
            other[lists.cells(rows)] = False
        if block.shape[1] > count:
            other &= rng.random(block.shape, np.float32) < count / block.shape[1]
        return block[other].astype(np.float32)

    def _average_pairs(
        self, query: np.ndarray, in_camera: np.ndarray, cameras: np.ndarray, camera: np.ndarray
    ) -> Pairs:
        """Scores by pairs of cameras, from the ranks of all matches within their cameras."""
        labels = self._labels
        # A list is one query in the gallery of one camera, a pair all lists of two cameras.
        keys, own = np.unique(
            np.stack([query, camera[labels.matches.indices]]), axis=1, return_inverse=True
        )
        own = own.ravel()
        ap = average_precisions(in_camera, own, keys.shape[1], self._protocol["ap"])
        first = np.full(keys.shape[1], np.iinfo(np.int64).max)
        np.minimum.at(first, own, in_camera)
        pairs, pair, queries = np.unique(
            np.stack([labels.query_camids[keys[0]], cameras[keys[1]]]),
            axis=1,
            return_inverse=True,
            return_counts=True,
        )
        pair = pair.ravel()
        return Pairs(
            query_camids=pairs[0],
            gallery_camids=pairs[1],
            queries=queries,
            mAP=np.bincount(pair, ap) / queries,
            rank1=np.bincount(pair, first == 1) / queries,
        )


def _gather(pairs: list[tuple[int, int, float]]) -> HardPairs:
    queries, gallery, distances = zip(*pairs, strict=True) if pairs else ((), (), ())
    return HardPairs(np.array(queries, int), np.array(gallery, int), np.array(distances))


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

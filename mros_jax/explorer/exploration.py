"""What the explorer shows of a run, as plain values: the page itself is in `page.py`."""

import csv
import dataclasses
import functools
import io
import os
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from mros_jax import console
from mros_jax.data.decoding import decode_image
from mros_jax.errors import NotFoundError, UserError
from mros_jax.explorer.projection import project
from mros_jax.inference import Embedder, load_model
from mros_jax.inspection.markup import describe_entry, describe_query, show_name
from mros_jax.inspection.parts import list_edges, list_parts
from mros_jax.inspection.pictures import Pictures, encode_pixels, name_image
from mros_jax.inspection.ranking import SHORTLIST, Entry, HardPairs, Ranking
from mros_jax.retrieval import Verification, verify
from mros_jax.retrieval.descriptors import ARRAYS
from mros_jax.runs.run import Run

Order = Literal["worst first", "best first", "as in the data set"]
ORDERS: tuple[Order, ...] = get_args(Order)
KINDS = ("nearest impostors", "farthest mates")


@dataclasses.dataclass(frozen=True)
class Errors:
    """What a threshold gets wrong: a pair is accepted where its distance is at most this.

    Attributes:
        threshold: the largest distance of a genuine pair within the one asked for. Between two
            such distances the misses are the same, and the lower one accepts fewer impostors.
        false_accepts: impostor pairs accepted.
        misses: genuine pairs rejected.
    """

    threshold: float
    false_accepts: int
    misses: int


class Exploration:
    """A run with its descriptors, rankings and pictures in memory.

    Args:
        path: the run's directory.
        progress: show a progress bar while re-rankings are prepared.

    Attributes:
        run: the run.
        features: the arrays of its `features.npz`.
        edges: group -> top and bottom of its parts in the image.

    Raises:
        NotFoundError: no run, or one without results, descriptors or data set.
        UserError: one of them is damaged, or the images are others.
    """

    def __init__(self, path: str | os.PathLike[str], *, progress: bool = False):
        self.run = Run.open(path)
        features = self.run.features
        if features is None:
            raise NotFoundError(
                f"{path} holds no features.npz, whose ranked lists are explored: python -m "
                f"mros_jax.evaluate --run {path} makes it"
            )
        self.features = features
        self._parts = list_parts(self.run)
        self.edges = list_edges(self._parts)
        self._pictures = Pictures(self.run, features)
        results = console.progress(
            self.run.rankings, desc="rankings", unit=" rankings", disable=not progress
        )
        self._rankings = [Ranking(features, result) for result in results]
        self._aps = [
            _spread_ap(result, len(features["query_pids"])) for result in self.run.rankings
        ]
        self.list_query(0, 1)  # compiles what every list needs

    @property
    def title(self) -> str:
        """What a reader knows the run by."""
        return f"{self.run.path.name}: {self.run.system} on {self.run.dataset}"

    @property
    def _protocol(self) -> dict[str, Any]:
        protocol: dict[str, Any] = self.run.rankings[0]["protocol"]
        return protocol

    def check_same_images(self, other: "Exploration") -> None:
        """Refuse to compare with a run that was tested on other images.

        Raises:
            UserError: it was.
        """
        for split in ("query", "gallery"):
            ours, theirs = (
                np.asarray(x.features.get(f"{split}_fingerprint", "")) for x in (self, other)
            )
            if ours != theirs:
                raise UserError(
                    f"{other.run} was tested on other {split} images than {self.run}; expected a "
                    "run on the same data set"
                )

    def find_queries(
        self, pid: int | None = None, camid: int | None = None, order: Order = "worst first"
    ) -> Int[np.ndarray, "M"]:
        """Rows of the queries of an identity, a camera, or both, ordered by plain AP.

        Those without a match have no AP and come last.
        """
        pids, camids = self.features["query_pids"], self.features["query_camids"]
        chosen = np.ones(len(pids), bool)
        for value, labels in ((pid, pids), (camid, camids)):
            if value is not None:
                chosen &= labels == value
        rows = np.flatnonzero(chosen)
        if order == "as in the data set":
            return rows
        sign = 1 if order == "worst first" else -1
        return rows[np.argsort(sign * self._aps[0][rows], kind="stable")]

    def describe_query(self, query: int) -> str:
        """A query in a line: name, identity, camera, plain AP."""
        ap = self._aps[0][query]
        shown = "no match" if np.isnan(ap) else f"AP {100 * ap:.1f}"
        pid, camid = (self.features[f"query_{x}"][query] for x in ("pids", "camids"))
        return f"{name_image(self.features, 'query', query)} · pid {pid} · c{camid} · {shown}"

    def list_query(self, query: int, top: int) -> dict[str, Any]:
        """The ranked lists of a query, of every ranking, as `lists.html` shows them.

        Raises:
            UserError: there is no such query.
        """
        count = len(self.features["query_pids"])
        if not 0 <= query < count:
            raise UserError(f"query is {query}; the run has 0..{count - 1}")
        rows = np.array([query])
        shown = describe_query(self.features, query, self._pictures.encode("query", [query])[query])
        entries = [
            ranking.list_top(query, ranking.rows(rows)[0], top) for ranking in self._rankings
        ]
        aps = [None if np.isnan(ap[query]) else float(ap[query]) for ap in self._aps]
        descriptor = self.features["query_features"][query]
        return shown | {"lists": self._describe_lists(descriptor, entries, aps)}

    def list_upload(self, data: bytes, name: str, top: int) -> dict[str, Any]:
        """The ranked lists of an image that is none of the run's, as `list_query`.

        It is decoded and embedded as the run's images are, by the weights that its descriptors
        are of. Nobody knows who it shows: nothing is right or wrong. Re-rankings work among the
        `SHORTLIST` nearest images.

        Args:
            data: the image's file.
            name: of the file.
            top: places to list.

        Raises:
            UserError: no image; the run's checkpoint is not the one that its descriptors are of.
        """
        pixels = decode_image(data, name).pixels
        descriptor = self._model.embed(
            [pixels],
            flip_test=bool(self.features.get("flip_test", False)),
            crops=str(self.features.get("crops", "none")),
        )[0]
        entries = [
            ranking.list_top(None, ranking.compare(descriptor), top) for ranking in self._rankings
        ]
        lists = self._describe_lists(descriptor, entries, [None] * len(entries))
        for place, shown in enumerate(lists):
            shown["note"] = f"of the {SHORTLIST:,} nearest" if place else "of the whole gallery"
        picture = encode_pixels(pixels)
        return {"picture": picture, "name": name, "camera": None, "pid": None, "lists": lists}

    @functools.cached_property
    def _model(self) -> Embedder:
        wanted = str(self.features.get("checkpoint_id", "unknown"))
        model = load_model(self.run.path, wanted.partition("-")[0])
        if model.checkpoint_id != wanted:
            raise UserError(
                f"the descriptors of {self.run} are of checkpoint {wanted}, and it holds "
                f"{model.checkpoint_id}: python -m mros_jax.evaluate --run {self.run} --out "
                f"{self.run.results_file} makes new ones"
            )
        return model

    def _describe_lists(
        self,
        descriptor: Float[np.ndarray, "D"],
        lists: list[list[Entry]],
        aps: list[float | None],
    ) -> list[dict[str, Any]]:
        wanted = sorted({entry.index for entries in lists for entry in entries})
        pictures = self._pictures.encode("gallery", wanted)
        return [
            {
                "name": show_name(ranking.name),
                "ap": ap,
                "entries": [
                    describe_entry(self.features, descriptor, entry, self._parts, pictures)
                    for entry in entries
                ],
            }
            for ranking, entries, ap in zip(self._rankings, lists, aps, strict=True)
        ]

    @functools.cached_property
    def verification(self) -> Verification:
        """Verification scores of the plain distances.

        Raises:
            UserError: there are no impostor pairs.
        """
        protocol = self._protocol
        names = ("metric", "normalize", "junk_pid", "distractor_pid")
        return verify(
            *(self.features[name] for name in ARRAYS), **{name: protocol[name] for name in names}
        )

    def count_errors(self, threshold: float) -> Errors:
        """False accepts and misses at a distance; below all genuine pairs those at the least."""
        scores = self.verification
        place = int(np.searchsorted(scores.thresholds, threshold, "right")) - 1
        place = max(place, 0)
        return Errors(
            threshold=float(scores.thresholds[place]),
            false_accepts=round(float(scores.fpr[place]) * scores.num_impostor),
            misses=round(float(scores.fnr[place]) * scores.num_genuine),
        )

    @functools.cached_property
    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        stacked = np.concatenate([self.features[f"{x}_features"] for x in ("query", "gallery")])
        return project(stacked, self._protocol["normalize"])

    def map_descriptors(
        self, color_by: Literal["camera", "identity"], most: int = 3000
    ) -> dict[str, Any]:
        """Points of the map of descriptors, junk left out.

        Args:
            color_by: what `label` is.
            most: points; of more a random sample is drawn, the same every time.

        Returns:
            "points", each with x and y (0 to 1), label, split and name; "shares" of the variance
            along x and y; "total", the number of descriptors without junk.
        """
        placed, shares = self._points
        splits = np.repeat(
            ["query", "gallery"], [len(self.features[f"{x}_pids"]) for x in ("query", "gallery")]
        )
        rows = np.concatenate([np.arange((splits == x).sum()) for x in ("query", "gallery")])
        pids = np.concatenate([self.features[f"{x}_pids"] for x in ("query", "gallery")])
        camids = np.concatenate([self.features[f"{x}_camids"] for x in ("query", "gallery")])
        kept = np.flatnonzero(pids != self._protocol["junk_pid"])
        total = len(kept)
        if total > most:
            kept = np.sort(np.random.default_rng(0).choice(kept, most, replace=False))
        low, high = placed[kept].min(0), placed[kept].max(0)
        scaled = (placed - low) / np.maximum(high - low, 1e-30)
        labels = camids if color_by == "camera" else pids
        points = [
            {
                "x": float(scaled[i, 0]),
                "y": float(scaled[i, 1]),
                "label": int(labels[i]),
                "split": str(splits[i]),
                "name": name_image(self.features, str(splits[i]), int(rows[i])),
            }
            for i in kept
        ]
        return {"points": points, "shares": shares.tolist(), "total": total}

    @functools.cached_property
    def hard_pairs(self) -> dict[str, HardPairs]:
        """Kind -> the hardest pair of each query, the hardest first, by the plain ranking."""
        return dict(zip(KINDS, self._rankings[0].find_hard(), strict=True))

    def list_hard_pairs(self, kind: str, first: int) -> list[dict[str, Any]]:
        """The hardest pairs of a kind, each as `lists.html` shows a list of one place.

        Args:
            kind: of `KINDS`.
            first: pairs to list.
        """
        pairs = self.hard_pairs[kind]
        queries, gallery = (rows[:first].tolist() for rows in (pairs.queries, pairs.gallery))
        pictures = {
            split: self._pictures.encode(split, sorted(set(rows)))
            for split, rows in (("query", queries), ("gallery", gallery))
        }
        status: Literal["match", "wrong"] = "match" if kind == KINDS[1] else "wrong"
        shown = []
        for query, index, distance in zip(queries, gallery, pairs.distances[:first], strict=True):
            entry = Entry(index, None, float(distance), status)
            descriptor = self.features["query_features"][query]
            described = describe_entry(
                self.features, descriptor, entry, self._parts, pictures["gallery"]
            )
            one = {"name": "", "ap": None, "entries": [described]}
            card = describe_query(self.features, query, pictures["query"][query])
            shown.append(card | {"lists": [one]})
        return shown

    def write_hard_pairs(self) -> str:
        """All hard pairs as CSV with a header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        splits = ("query", "gallery")
        columns = [f"{split}_{what}" for split in splits for what in ("name", "pid", "camid")]
        writer.writerow(["kind", *columns, "distance"])
        for kind, pairs in self.hard_pairs.items():
            for query, index, distance in zip(
                pairs.queries, pairs.gallery, pairs.distances, strict=True
            ):
                cells = []
                for split, row in (("query", query), ("gallery", index)):
                    pid, camid = (self.features[f"{split}_{x}"][row] for x in ("pids", "camids"))
                    cells += [name_image(self.features, split, int(row)), int(pid), int(camid)]
                writer.writerow([kind.removesuffix("s"), *cells, f"{distance:.6g}"])
        return out.getvalue()


def _spread_ap(result: dict[str, Any], num_query: int) -> Float[np.ndarray, "Q"]:
    """Average precision of every query of a ranking; NaN of those without a match."""
    ap = np.full(num_query, np.nan)
    ap[result["valid_queries"]] = result["ap"]
    return ap

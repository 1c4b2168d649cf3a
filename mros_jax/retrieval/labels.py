"""Who matches whom: lists of matching and of removed gallery images, by the Market-1501 rules."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from mros_jax.errors import UserError
from mros_jax.retrieval.inputs import Numbers, check_ids, check_pid


@dataclasses.dataclass(frozen=True)
class Side:
    """The queries, or the gallery.

    Attributes:
        features: (N, D) descriptors, numbers of any type.
        pids: (N,) identities, whole numbers.
        camids: (N,) cameras, whole numbers.
    """

    features: Numbers
    pids: Numbers
    camids: Numbers


def make_sides(data: tuple[Side | Numbers, ...]) -> tuple[Side, Side]:
    """Queries and gallery from two sides, or from six arrays.

    Args:
        data: two `Side`; or the features of queries and gallery, their pids, and their camids.

    Raises:
        TypeError: neither.
    """
    sides = [side for side in data if isinstance(side, Side)]
    arrays = [array for array in data if not isinstance(array, Side)]
    if len(sides) == len(data) == 2:
        return sides[0], sides[1]
    if len(arrays) == len(data) == 6:
        return Side(*arrays[::2]), Side(*arrays[1::2])
    raise TypeError(
        f"got {len(data)} positional arguments; expected two Side, or six arrays: query_features, "
        "gallery_features, query_pids, gallery_pids, query_camids, gallery_camids"
    )


@dataclasses.dataclass(frozen=True)
class Lists:
    """Ragged lists of gallery indices, one list a query.

    Attributes:
        starts: (Q + 1,) list i is indices[starts[i] : starts[i + 1]].
        indices: (P,) each list rising.
    """

    starts: Int64[np.ndarray, "Q1"]
    indices: Int64[np.ndarray, "P"]

    @property
    def lengths(self) -> Int64[np.ndarray, "Q"]:
        """Length of each list."""
        return np.diff(self.starts)

    def of(self, row: int | np.integer) -> Int64[np.ndarray, "L"]:
        """The list of one row."""
        return self.indices[self.starts[row] : self.starts[row + 1]]

    def places(self, rows: Int[np.ndarray, "B"]) -> Int64[np.ndarray, "K"]:
        """Where in `indices` the lists of `rows` are, one after the other."""
        row, position = ragged_positions(self.lengths[rows])
        places: np.ndarray = self.starts[rows][row] + position
        return places

    def cells(
        self, rows: Int[np.ndarray, "B"]
    ) -> tuple[Int64[np.ndarray, "K"], Int64[np.ndarray, "K"]]:
        """(row within `rows`, gallery index) of every element of their lists."""
        row, _ = ragged_positions(self.lengths[rows])
        return row, self.indices[self.places(rows)]

    def pad(self, rows: Int[np.ndarray, "B"]) -> Int32[np.ndarray, "B M"]:
        """Lists of `rows` side by side, -1 after the end.

        The width is a power of two, so that few shapes are compiled.
        """
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        width = 1 << max(3, (longest - 1).bit_length()) if longest else 1
        table = np.full((len(rows), width), -1, np.int32)
        row, position = ragged_positions(lengths)
        table[row, position] = self.indices[self.places(rows)]
        return table


@dataclasses.dataclass(frozen=True)
class Labels:
    """Checked labels without junk, and what follows from them for each query.

    Attributes:
        query_pids: (Q,).
        query_camids: (Q,).
        gallery_pids: (G,) of the gallery images kept.
        gallery_camids: (G,) of these.
        kept: (G,) their indices in the gallery as given.
        matches: true matches: the query's pid, another camera.
        removed: the query's pid and camera: they do not count in its ranking.
        num_junk: gallery images left out.
        num_distractors: gallery images that match nobody.
    """

    query_pids: Int64[np.ndarray, "Q"]
    query_camids: Int64[np.ndarray, "Q"]
    gallery_pids: Int64[np.ndarray, "G"]
    gallery_camids: Int64[np.ndarray, "G"]
    kept: Int64[np.ndarray, "G"]
    matches: Lists
    removed: Lists
    num_junk: int
    num_distractors: int

    def mark(
        self, query: int
    ) -> tuple[Bool[np.ndarray, "num_gallery"], Bool[np.ndarray, "num_gallery"]]:
        """Which images of the whole gallery count in a query's ranking, and which of them match."""
        counted = np.zeros(len(self.kept) + self.num_junk, bool)
        matches = counted.copy()
        row = np.array([query])
        counted[self.kept] = True
        counted[self.kept[self.removed.cells(row)[1]]] = False
        matches[self.kept[self.matches.cells(row)[1]]] = True
        return counted, matches

    def explain_no_match(self) -> str:
        """Why no query has a match."""
        start = f"none of the {len(self.query_pids)} queries has a true match in the gallery: "
        if len(self.gallery_pids) == 0:
            return start + f"all {self.num_junk} gallery images are junk"
        if len(self.removed.indices):
            cameras = np.unique(self.query_camids)
            seen = f" (all queries have camera {cameras[0]})" if len(cameras) == 1 else ""
            return start + (
                f"all {len(self.removed.indices)} pairs of the same pid are of one camera and so "
                f"are removed{seen}. Check the camids: a single camera cannot be evaluated"
            )
        if not np.isin(self.query_pids, self.gallery_pids).any():
            return start + (
                f"no query pid (e.g. {self.query_pids[0]}) is among the gallery pids (e.g. "
                f"{self.gallery_pids[0]})"
            )
        return start + (
            "all query pids mean distractor; if pid 0 is a person here, pass distractor_pid=None"
        )


def ragged_positions(
    lengths: Int[np.ndarray, "B"],
) -> tuple[Int64[np.ndarray, "K"], Int64[np.ndarray, "K"]]:
    """(row, position within the row) of every element of rows of these lengths."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def check_labels(
    query_pids: Numbers,
    gallery_pids: Numbers,
    query_camids: Numbers,
    gallery_camids: Numbers,
    num_query: int,
    num_gallery: int,
    *,
    junk_pid: int | None,
    distractor_pid: int | None,
) -> Labels:
    """Check labels, leave junk out and list matches.

    Raises:
        UserError: labels that are no whole numbers or not as many as images; no query has a match.
    """
    check_pid(junk_pid, "junk_pid")
    check_pid(distractor_pid, "distractor_pid")
    q_pids = check_ids(query_pids, "query_pids", num_query)
    g_pids = check_ids(gallery_pids, "gallery_pids", num_gallery)
    q_cams = check_ids(query_camids, "query_camids", num_query)
    g_cams = check_ids(gallery_camids, "gallery_camids", num_gallery)
    kept = np.arange(num_gallery) if junk_pid is None else np.flatnonzero(g_pids != junk_pid)
    g_pids, g_cams = g_pids[kept], g_cams[kept]

    by_pid = np.argsort(g_pids, kind="stable")
    first = np.searchsorted(g_pids, q_pids, "left", sorter=by_pid)
    lengths = np.searchsorted(g_pids, q_pids, "right", sorter=by_pid) - first
    if distractor_pid is not None:
        lengths[q_pids == distractor_pid] = 0
    row, position = ragged_positions(lengths)
    same_pid = by_pid[first[row] + position]
    same_camera = g_cams[same_pid] == q_cams[row]

    def select(mask: np.ndarray) -> Lists:
        counts = np.bincount(row[mask], minlength=num_query)
        return Lists(np.concatenate([[0], np.cumsum(counts)]), same_pid[mask])

    labels = Labels(
        query_pids=q_pids,
        query_camids=q_cams,
        gallery_pids=g_pids,
        gallery_camids=g_cams,
        kept=kept,
        matches=select(~same_camera),
        removed=select(same_camera),
        num_junk=num_gallery - len(kept),
        num_distractors=0 if distractor_pid is None else int((g_pids == distractor_pid).sum()),
    )
    if len(labels.matches.indices) == 0:
        raise UserError(labels.explain_no_match())
    return labels

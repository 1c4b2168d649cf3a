"""One-to-one and open-set scores: ROC, TPR at FPR, EER, DET, and DIR at FAR, with thresholds.

Pairs are queries with gallery images. Junk and images of the query's own pid and camera make no
pairs. A pair is accepted where its distance is at most the threshold.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from mros_jax.errors import UserError, check_choice
from mros_jax.retrieval import blocks, distances
from mros_jax.retrieval.inputs import (
    Numbers,
    check_matrix,
    check_number,
    check_pair,
    show_rows,
)
from mros_jax.retrieval.labels import Labels, Side, check_labels, make_sides

RATES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """The largest threshold whose false rate is at most `target`.

    Attributes:
        target: the rate asked for.
        false_rate: the rate there (FPR, or FAR), at most the target.
        true_rate: share that is accepted rightly there (TPR, or DIR).
        threshold: largest accepted distance; None where nothing can be accepted.
    """

    target: float
    false_rate: float
    true_rate: float
    threshold: float | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """Verification and open-set identification scores, as fractions of 1.

    Attributes:
        thresholds: (T,) rising: the distances of genuine pairs, each once. Nowhere else does the
            TPR change, so these points hold the whole ROC.
        fpr: (T,) share of impostor pairs accepted (false positive rate).
        tpr: (T,) share of genuine pairs accepted (true positive rate).
        tpr_at_fpr: operating points of the ROC.
        eer: the rate at which FPR and FNR are equal, interpolated on the ROC.
        eer_threshold: the distance there.
        dir_at_far: operating points of open-set identification at rank 1 (see `verify`).
        num_genuine: genuine pairs.
        num_impostor: impostor pairs.
        num_known: queries with a match, over which DIR is taken.
        num_unknown: searches without a match, over which FAR is taken.
    """

    thresholds: Float64[np.ndarray, "T"]
    fpr: Float64[np.ndarray, "T"]
    tpr: Float64[np.ndarray, "T"]
    tpr_at_fpr: list[OperatingPoint]
    eer: float
    eer_threshold: float
    dir_at_far: list[OperatingPoint]
    num_genuine: int
    num_impostor: int
    num_known: int
    num_unknown: int

    @property
    def fnr(self) -> Float64[np.ndarray, "T"]:
        """(T,) share of genuine pairs rejected; against `fpr` the points of the DET curve."""
        return 1.0 - self.tpr

    def to_dict(self, points: int = 500) -> dict[str, Any]:
        """Plain values, with at most `points` of the ROC, evenly spaced in rank."""
        values = dataclasses.asdict(self)
        chosen = np.linspace(0, len(self.fpr) - 1, min(points, len(self.fpr))).round().astype(int)
        for name in ("thresholds", "fpr", "tpr"):
            values[name] = values[name][chosen].tolist()
        return values | {"fnr": self.fnr[chosen].tolist()}

    def __str__(self) -> str:
        parts = [f"TPR@FPR={p.target:g} {100 * p.true_rate:.2f}" for p in self.tpr_at_fpr]
        parts += [f"DIR@FAR={p.target:g} {100 * p.true_rate:.2f}" for p in self.dir_at_far]
        return f"EER {100 * self.eer:.2f}  " + "  ".join(parts)


def verify(
    *data: Side | Numbers,
    metric: str = "cosine",
    normalize: bool = True,
    rates: Sequence[float] = RATES,
    junk_pid: int | None = -1,
    distractor_pid: int | None = 0,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Verification:
    """Verification scores of descriptors: exact, in O(block x gallery) memory.

    DIR at FAR (detection and identification rate at a false alarm rate, open-set, rank 1): an
    alarm is raised where the nearest gallery image is within the threshold. DIR is the share of
    queries with a match whose nearest image is one and raises an alarm. FAR is the share of
    searches for unknown people that raise an alarm: each query once more with its matches taken
    out of the gallery, and the queries that have none anyhow.

    Args:
        *data: two `Side`, or six arrays, as `evaluate` takes them.
        metric: "cosine" or "euclidean".
        normalize: divide descriptors by their norm.
        rates: false rates to report at.
        junk_pid: pid of junk gallery images; None if there are none.
        distractor_pid: pid that matches nobody; None if there is none.
        placement: devices and block size.

    Raises:
        UserError: as `evaluate`; no genuine or no impostor pair.
    """
    query_side, gallery_side = make_sides(data)
    check_choice("metric", metric, distances.METRICS)
    query, gallery, exponent = check_pair(
        query_side.features, gallery_side.features, normalize=normalize
    )
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
    if labels.num_junk:
        gallery = blocks.take_rows(gallery, labels.kept)
    compute = distances.Gallery(
        gallery, distances.choose_kind(metric, normalize), placement=placement
    )

    def rows_of(rows: np.ndarray) -> np.ndarray:
        return distances.restore(compute(query[rows]), metric, exponent)

    return _verify(rows_of, labels, rates)


def verify_distances(
    distance: Numbers,
    query_pids: Numbers,
    gallery_pids: Numbers,
    query_camids: Numbers,
    gallery_camids: Numbers,
    *,
    rates: Sequence[float] = RATES,
    junk_pid: int | None = -1,
    distractor_pid: int | None = 0,
) -> Verification:
    """As `verify`, of a given (Q, G) matrix of distances.

    Raises:
        UserError: as `evaluate_distances`; no genuine or no impostor pair.
    """
    matrix = np.asarray(check_matrix(distance))
    bad = ~np.isfinite(matrix).all(1)
    if bad.any():
        raise UserError(f"distance holds NaN or infinity in {show_rows(bad)}")
    labels = check_labels(
        query_pids,
        gallery_pids,
        query_camids,
        gallery_camids,
        *matrix.shape,
        junk_pid=junk_pid,
        distractor_pid=distractor_pid,
    )
    return _verify(lambda rows: matrix[rows][:, labels.kept], labels, rates)


def _verify(
    rows_of: Callable[[np.ndarray], np.ndarray], labels: Labels, rates: Sequence[float]
) -> Verification:
    for rate in rates:
        check_number(rate, "one of rates", 0, 1, ends=False)
    num_query, num_gallery = len(labels.query_pids), len(labels.gallery_pids)
    genuine, known = _collect_genuine(rows_of, labels)
    thresholds, ties = np.unique(genuine, return_counts=True)
    accepted = np.zeros(len(thresholds), np.int64)  # impostors at most the threshold
    below = np.zeros(len(thresholds), np.int64)  # impostors under it
    nearest_impostor = np.empty(num_query)
    num_impostor = 0
    for rows in _blocks(num_query, num_gallery):
        block = rows_of(rows).astype(np.float64 if genuine.dtype == np.float64 else np.float32)
        for lists in (labels.matches, labels.removed):
            block[lists.cells(rows)] = np.inf
        nearest_impostor[rows] = block.min(1)
        impostors = np.sort(block, axis=None)
        impostors = impostors[: np.searchsorted(impostors, np.inf)]
        num_impostor += len(impostors)
        accepted += np.searchsorted(impostors, thresholds, "right")
        below += np.searchsorted(impostors, thresholds, "left")
    if num_impostor == 0:
        raise UserError("there are no impostor pairs: query and gallery show one person only")
    tpr = np.cumsum(ties) / len(genuine)
    fpr, fpr_below = accepted / num_impostor, below / num_impostor
    eer, eer_threshold = _equal_error_rate(thresholds, fpr, fpr_below, tpr)

    # Rank 1 is a match where the nearest match comes before the nearest other image.
    found = known < nearest_impostor
    alarms = nearest_impostor[np.isfinite(nearest_impostor)]
    levels = np.unique(known[found]) if found.any() else np.array([])
    num_known = int(np.isfinite(known).sum())
    far = np.searchsorted(np.sort(alarms), levels, "right") / max(len(alarms), 1)
    hits = np.searchsorted(np.sort(known[found]), levels, "right") / num_known
    return Verification(
        thresholds=thresholds.astype(np.float64),
        fpr=fpr,
        tpr=tpr,
        tpr_at_fpr=[_pick(rate, thresholds, fpr, tpr) for rate in rates],
        eer=eer,
        eer_threshold=eer_threshold,
        dir_at_far=[_pick(rate, levels, far, hits) for rate in rates],
        num_genuine=len(genuine),
        num_impostor=num_impostor,
        num_known=num_known,
        num_unknown=len(alarms),
    )


def _blocks(num_query: int, num_gallery: int) -> list[np.ndarray]:
    step = blocks.choose_block(num_gallery)
    return [np.arange(s, min(s + step, num_query)) for s in range(0, num_query, step)]


def _collect_genuine(
    rows_of: Callable[[np.ndarray], np.ndarray], labels: Labels
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all genuine pairs, and of each query's nearest match (infinite without one)."""
    if len(labels.matches.indices) == 0:
        raise UserError(labels.explain_no_match())
    found, nearest = [], np.full(len(labels.query_pids), np.inf)
    for rows in _blocks(len(labels.query_pids), len(labels.gallery_pids)):
        row, column = labels.matches.cells(rows)
        if len(row):
            found.append(rows_of(rows)[row, column])
            np.minimum.at(nearest, rows[row], found[-1])
    return np.concatenate(found), nearest


def _pick(
    rate: float,
    thresholds: Float[np.ndarray, "T"],
    false_rate: Float64[np.ndarray, "T"],
    true_rate: Float64[np.ndarray, "T"],
) -> OperatingPoint:
    last = int(np.searchsorted(false_rate, rate, "right")) - 1
    if last < 0:
        return OperatingPoint(float(rate), 0.0, 0.0, None)
    return OperatingPoint(
        float(rate), float(false_rate[last]), float(true_rate[last]), float(thresholds[last])
    )


def _equal_error_rate(
    thresholds: np.ndarray, fpr: np.ndarray, fpr_below: np.ndarray, tpr: np.ndarray
) -> tuple[float, float]:
    """Where the ROC, as a line through all its corners, meets FPR = 1 - TPR."""
    tpr_below = np.concatenate([[0.0], tpr[:-1]])
    x = np.concatenate([[0.0], np.stack([fpr_below, fpr], axis=1).ravel(), [1.0]])
    y = np.concatenate([[0.0], np.stack([tpr_below, tpr], axis=1).ravel(), [1.0]])
    at = np.repeat(thresholds, 2).astype(np.float64)
    at = np.concatenate([at[:1], at, at[-1:]])
    gap = x + y - 1.0  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    eer = x[after - 1] + share * (x[after] - x[after - 1])
    return float(eer), float(at[after - 1] + share * (at[after] - at[after - 1]))

"""How sure a score is: bootstrap intervals, and a paired test between two results.

Queries of one identity are alike, so resampling them one by one makes intervals too narrow;
`by="identity"` resamples identities with all their queries (a cluster bootstrap).
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int

from mros_jax.errors import UserError, check_choice
from mros_jax.retrieval.inputs import check_count, check_number
from mros_jax.retrieval.metrics import Result

UNITS = ("query", "identity")
_RANKS = (1, 5, 10)
_CELLS = 2**22  # of the resampling weights that are held at once


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second result minus the first, as fractions of 1.

    Attributes:
        metric: "mAP", "mINP" or "rank1", "rank5", "rank10".
        difference: of the means over queries.
        low: lower end of its confidence interval.
        high: upper end.
        p_value: two-sided, of the sign-flip permutation test: how often a difference at least as
            large comes about if the two results were interchangeable for each unit.
    """

    metric: str
    difference: float
    low: float
    high: float
    p_value: float


def _values(result: Result) -> tuple[list[str], Float64[np.ndarray, "V M"]]:
    """Per-query numbers whose means are the metrics."""
    hits = [(result.first_match_rank <= k).astype(np.float64) for k in _RANKS]
    names = ["mAP", "mINP", *(f"rank{k}" for k in _RANKS)]
    return names, np.stack([result.ap, result.inp, *hits], axis=1)


def _sum_units(
    values: Float64[np.ndarray, "V M"], pids: Int[np.ndarray, "V"], by: str
) -> tuple[Float64[np.ndarray, "U M"], Float64[np.ndarray, "U"]]:
    """Sums and numbers of queries of each unit that is resampled."""
    check_choice("by", by, UNITS)
    if by == "query":
        return values, np.ones(len(values))
    _, unit = np.unique(pids, return_inverse=True)
    sums = np.zeros((unit.max() + 1, values.shape[1]))
    np.add.at(sums, unit, values)
    return sums, np.bincount(unit).astype(np.float64)


def _resample(
    sums: Float64[np.ndarray, "U M"],
    counts: Float64[np.ndarray, "U"],
    samples: int,
    rng: np.random.Generator,
) -> Float64[np.ndarray, "S M"]:
    """Means of resamples of the units, drawn with replacement."""
    units = len(counts)
    means = []
    step = max(1, _CELLS // units)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        weights = rng.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64)
        means.append(weights @ sums / (weights @ counts)[:, None])
    return np.concatenate(means)


def _check(samples: int, confidence: float) -> None:
    check_count(samples, "samples")
    check_number(confidence, "confidence", 0, 1, ends=False)


def estimate_intervals(
    result: Result,
    *,
    rng: np.random.Generator,
    samples: int = 2000,
    by: str = "identity",
    confidence: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals (Efron, 1979) of mAP, mINP, and Rank-1, 5 and 10.

    Args:
        result: of `evaluate`.
        rng: where the resamples come from.
        samples: resamples.
        by: "query", or "identity" for resampling identities with all their queries.
        confidence: share of the interval.

    Returns:
        (low, high) by metric: "mAP", "mINP", "rank1", "rank5", "rank10"; fractions of 1.

    Raises:
        UserError: parameters out of range.
    """
    _check(samples, confidence)
    names, values = _values(result)
    means = _resample(*_sum_units(values, result.query_pids, by), samples, rng)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def compare_paired(
    first: Result,
    second: Result,
    *,
    rng: np.random.Generator,
    samples: int = 2000,
    by: str = "identity",
    confidence: float = 0.95,
) -> list[Difference]:
    """Test whether two results on the same queries differ.

    Args:
        first: of `evaluate`.
        second: of the same queries; their distances may come from other descriptors, re-ranking,
            anything.
        rng: where resamples and flips come from.
        samples: resamples for the interval, and sign flips for the test.
        by: unit that is resampled and flipped: "query" or "identity".
        confidence: share of the interval.

    Returns:
        A `Difference` for each metric.

    Raises:
        UserError: results of different queries; parameters out of range.
    """
    _check(samples, confidence)
    same = np.array_equal(first.valid_queries, second.valid_queries) and np.array_equal(
        first.query_pids, second.query_pids
    )
    if not same:
        raise UserError(
            f"the results are of different queries ({len(first.ap)} and {len(second.ap)} valid "
            "ones, or other identities): a paired test needs the same queries in the same order"
        )
    names, a = _values(first)
    difference = _values(second)[1] - a
    sums, counts = _sum_units(difference, first.query_pids, by)
    means = _resample(sums, counts, samples, rng)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    observed = sums.sum(0)
    at_least = np.zeros(len(names))
    step = max(1, _CELLS // len(sums))
    for start in range(0, samples, step):
        shape = (min(step, samples - start), len(sums))
        signs = rng.integers(0, 2, shape).astype(np.float64) * 2 - 1
        # A hair of tolerance: sums of the same numbers in another order count as equal.
        at_least += (np.abs(signs @ sums) >= np.abs(observed) - 1e-9).sum(0)
    p_values = (at_least + 1) / (samples + 1)  # the observed signs are one of the flips
    mean = difference.mean(0)
    return [
        Difference(name, float(mean[i]), float(low[i]), float(high[i]), float(p_values[i]))
        for i, name in enumerate(names)
    ]

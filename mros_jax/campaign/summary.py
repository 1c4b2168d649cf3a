"""Scores over seeds, how sure they are, and what was published of the same system."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax.retrieval import Result, bootstrap
from mros_jax.runs import paper as papers
from mros_jax.runs.results import get_scores

CONFIDENCE = 0.95
# What an interval is, for the tables that have one.
INTERVAL = (
    "Brackets: where one more run with another seed lies with 95 % confidence (Student's t, of "
    "two seeds or more); of a single seed the bootstrap over the test identities."
)


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric over seeds, in percent.

    Attributes:
        values: one a seed.
        low: lower end of the interval, see `INTERVAL`.
        high: upper end.
    """

    values: tuple[float, ...]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.values) if self.values[1:] else None


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """The interval of one more value of a normal distribution, of which two or more are known.

    It is m -+ t s sqrt(1 + 1/n), with t of n - 1 degrees of freedom: a published number is one
    run, not the mean of many.

    Args:
        values: the known ones.
    """
    import scipy.special  # takes longer to load than all else here

    n = len(values)
    t = float(scipy.special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2))
    half = t * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def score(entries: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """The scores of one ranking of several seeds, by the keys of `mros_jax.runs.paper.METRICS`.

    Args:
        entries: of results.json, one of each seed.
    """
    columns = [{k: 100 * v for k, v in get_scores(entry).items()} for entry in entries]
    ends: dict[str, tuple[float, float]] = {}
    if len(entries) == 1:
        rng = np.random.default_rng(0)
        found = bootstrap.estimate_intervals(
            Result.from_dict(entries[0]), rng=rng, confidence=CONFIDENCE
        )
        ends = {name: (100 * low, 100 * high) for name, (low, high) in found.items()}
    scores = {}
    for name in papers.METRICS.values():
        if any(name not in column for column in columns):
            continue
        values = tuple(column[name] for column in columns)
        low, high = estimate(values) if len(values) > 1 else ends[name]
        scores[name] = Score(values, max(low, 0.0), min(high, 100.0))
    return scores


def describe_protocol(differences: Mapping[str, Any]) -> str:
    """A protocol in a few words, where it differs from the plain one of MROS's paper."""
    words = {
        ("crops", "ten"): "ten crops",
        ("flip_test", True): "mirror images",
        ("ap", "trapezoid"): "trapezoid AP",
        ("metric", "euclidean"): "Euclidean",
        ("normalize", False): "not normalized",
    }
    return ", ".join(words.get(item, f"{item[0]} {item[1]}") for item in differences.items())

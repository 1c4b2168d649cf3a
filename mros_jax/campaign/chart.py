"""Accuracy against cost, drawn."""

import logging
from collections.abc import Sequence

from mros_jax import extras
from mros_jax.campaign.board import Line

log = logging.getLogger(__name__)


def plot(lines: Sequence[Line]) -> str | None:
    """MAP against multiply-adds as an SVG file; None where fewer than two systems have both.

    A ring is a variant: it has the network, or nearly that, of the dot of its name.
    """
    drawn = [(line, line.cost) for line in lines if line.scores and line.cost is not None]
    if len(drawn) < 2:
        return None
    if missing := extras.find_missing("report", "The plot"):
        log.warning("%s", missing)
        return None
    from mros_jax.report import plots  # matplotlib is slow to import

    points = [
        plots.Point(
            line.system,
            cost.multiply_adds * cost.passes / 1e6,
            line.scores["mAP"].mean,
            line.scores["mAP"].low,
            line.scores["mAP"].high,
        )
        for line, cost in drawn
    ]
    svg = plots.plot_points(
        "systems",
        "mAP of each system against the multiply-adds of a descriptor",
        points,
        xlabel="multiply-adds of a descriptor, all passes of a test, in millions",
        ylabel="mAP, %",
    )
    return plots.to_file(svg)

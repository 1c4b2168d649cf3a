"""Accuracy against cost, drawn."""

import logging
from collections.abc import Sequence

from mros_jax import extras
from mros_jax.campaign.board import Line

log = logging.getLogger(__name__)


def draw(lines: Sequence[Line]) -> str | None:
    """Draw mAP against multiply-adds, for a page; None where fewer than two systems have both."""
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
    return plots.plot_points(
        "systems",
        "mAP of each system against the multiply-adds of a descriptor",
        points,
        xlabel="multiply-adds of a descriptor, all passes of a test, in millions",
        ylabel="mAP, %",
    )


def draw_file(lines: Sequence[Line]) -> str | None:
    """As `draw`, as an SVG file by itself."""
    if (svg := draw(lines)) is None:
        return None
    from mros_jax.report import plots

    return plots.to_file(svg)

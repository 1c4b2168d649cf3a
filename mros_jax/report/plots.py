"""Charts as inline SVG that takes its colours from the page, dark or light."""

import dataclasses
import importlib.resources
import importlib.util
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A notebook's shell passes on a backend that may not be there, and matplotlib fails on it for good.
_backend = os.environ.get("MPLBACKEND", "")
if _backend.startswith("module://"):
    _package = _backend.removeprefix("module://").partition(".")[0]
    if importlib.util.find_spec(_package) is None:
        del os.environ["MPLBACKEND"]
import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

# Matplotlib draws in stand-in colours; each is replaced by a CSS variable of the page.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--c1)",
    "#050505": "var(--c2)",
    "#060606": "var(--c3)",
    "#070707": "var(--c4)",
    "#080808": "var(--c5)",
}
_INK, _MUTED, _LINE, *SERIES = _VARIABLES
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
_POINTS = 300  # of a curve: more cannot be seen


def _render(figure: Figure, name: str, description: str) -> str:
    """The SVG element of a figure, with identifiers of its own and no fixed size."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Its style element would apply to the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # Ids of groups are the same in every figure; only those of clip paths and markers are used.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: [^;]*?([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    label = description.replace('"', "'")
    return f'{head} role="img" aria-label="{label}" data-chart="{name}">{body}'.strip()


def _make_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _plain(value: float | int, _: Any = None) -> str:
    return f"{value:g}"


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `_POINTS` stretches of equal length."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(x), _POINTS + 1).astype(int)
    starts, sizes = edges[:-1], np.diff(edges)
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def plot_lines(
    name: str,
    description: str,
    series: Mapping[str, tuple[Sequence[float | int], Sequence[float | int]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    markers: bool = False,
    top: float | int | None = None,
    bottom: float | int | None = None,
    ranks: bool = False,
) -> str:
    """A chart of curves.

    Args:
        name: identifies the chart on the page.
        description: what a reader who cannot see it is told.
        series: label -> (x, y); at most five.
        xlabel: what x is.
        ylabel: what y is.
        log: logarithmic y axis; values <= 0 are left out.
        markers: mark the points.
        top: upper end of the y axis.
        bottom: lower end of the y axis.
        ranks: x counts from 1, in whole numbers.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _make_axes(xlabel, ylabel)
        for color, (label, (x, y)) in zip(SERIES, series.items(), strict=False):
            xs, ys = _thin(np.asarray(x, float), np.asarray(y, float))
            style: dict[str, Any] = {"marker": "o", "markersize": 4} if markers else {}
            if log:
                ys = np.where(ys > 0, ys, np.nan)
            axes.plot(xs, ys, color=color, label=label, **style)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        if top is not None or bottom is not None:
            axes.set_ylim(bottom=bottom, top=top)
        if ranks:
            axes.set_xlim(left=1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(ncols=2 if len(series) > 3 else 1)
        return _render(figure, name, description)


@dataclasses.dataclass(frozen=True)
class Point:
    """A named point of `plot_points`.

    Attributes:
        label: written beside it.
        x: to the right.
        y: upwards.
        low: lower end of the interval of y; None: it has none.
        high: upper end.
    """

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def plot_points(
    name: str, description: str, points: Sequence[Point], *, xlabel: str, ylabel: str
) -> str:
    """A chart of named points over a logarithmic x axis, each name where it hides no other.

    Args:
        name: identifies the chart on the page.
        description: what a reader who cannot see it is told.
        points: with x above 0.
        xlabel: what x is.
        ylabel: what y is.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 5.6), dpi=72, layout="constrained")  # as SVG: pixels are points
        axes = figure.add_subplot()
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for point in points:
            if point.low is not None and point.high is not None:
                axes.plot([point.x, point.x], [point.low, point.high], color=_LINE, linewidth=3)
        for point in points:
            axes.plot(point.x, point.y, "o", markersize=7, color=SERIES[0], zorder=3)
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        _name_points(figure, axes, points)
        return _render(figure, name, description)


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's label at the nearest free place around it, joined by a line if far."""
    renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()  # places the axes
    places = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    frame = axes.get_window_extent(renderer)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.annotate(
            point.label,
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": _MUTED, "linewidth": 0.6, "shrinkB": 4},
        )
        size = text.get_window_extent(renderer)
        best, least = (0.0, 0.0), math.inf
        for distance in (12, 24, 40, 60, 85, 115, 150):
            for angle in angles:
                shift = (
                    np.cos(angle) * (distance + size.width / 2),
                    np.sin(angle) * (distance + size.height / 2 - 6),
                )
                box = Bbox.from_bounds(
                    x + shift[0] - size.width / 2 - 2,
                    y + shift[1] - size.height / 2 - 1,
                    size.width + 4,
                    size.height + 2,
                )
                outside = not (frame.x0 < box.x0 < box.x1 < frame.x1)
                outside |= not (frame.y0 < box.y0 < box.y1 < frame.y1)
                hidden = sum(box.overlaps(other) for other in taken) + 100 * outside
                if hidden < least:
                    best, least, place = shift, hidden, box
            if least == 0:
                break
        text.set_position(best)
        taken.append(place)


def to_file(svg: str) -> str:
    """A chart of this module as an SVG file by itself, on a card in the page's dark or light."""
    styles = (importlib.resources.files("mros_jax.inspection") / "lists.css").read_text()
    palette = styles[styles.index(":root") : styles.index("* {")]
    head, body = svg.split(">", 1)
    card = '<rect width="100%" height="100%" fill="var(--card)"/>'
    return f"{head}><style>{palette}</style>{card}{body}\n"


def plot_histograms(
    name: str,
    description: str,
    groups: Mapping[str, np.ndarray],
    *,
    xlabel: str,
    log: bool = False,
) -> str:
    """Densities of two groups of numbers over the same bins; `log`: on a logarithmic axis."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _make_axes(xlabel, "density")
        values = np.concatenate(list(groups.values()))
        low, high = np.quantile(values, [0.0005, 0.9995]) if len(values) else (0.0, 1.0)
        bins = np.linspace(low, max(high, low + 1e-6), 61)
        for color, (label, group) in zip((SERIES[2], SERIES[3]), groups.items(), strict=False):
            if len(group) == 0:
                continue
            density, _ = np.histogram(np.clip(group, bins[0], bins[-1]), bins, density=True)
            axes.stairs(density, bins, fill=True, color=color, alpha=0.3)
            axes.stairs(density, bins, color=color, label=label, linewidth=1.6)
        if log:
            axes.set_yscale("log")
            axes.set_ylabel("density (logarithmic)")
        else:
            axes.set_ylim(bottom=0)
        axes.tick_params(axis="y", which="both", labelleft=False)
        axes.legend()
        return _render(figure, name, description)

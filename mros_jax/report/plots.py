"""Charts as inline SVG that takes its colours from the page, dark or light."""

import importlib.util
import io
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
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

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

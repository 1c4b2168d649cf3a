"""How time and memory of an evaluation grow: with the gallery, the descriptors, the devices.

    python -m scripts.bench_growth --quick                          # a smoke test
    python -m scripts.bench_growth --plots docs/images              # half an hour
    python -m scripts.bench_growth --part numbers,devices --plots docs/images

One of the three changes, the others are Market-1501's (15,913 gallery images), 512 numbers and one
device. Descriptors and labels are random, as `bench_retrieval` makes them, for 3,368 queries. Every
point is a process of its own: the best of its repeats after a first call, which compiles (galleries
of 500,000 and more have this one alone); the processor time of the same; and the peak memory of the
whole process after the first call, libraries and descriptors included. Devices are virtual ones,
which share the cores: the scores must be the same on them, and the time should be.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from mros_jax import console, extras
from scripts import common
from scripts.bench_retrieval import (
    MARKET,
    QUERIES,
    Case,
    make_input,
    ours_features,
    ours_rerank_scores,
    run_once,
)

PLAIN, ECN = "CMC, mAP, mINP", "with ECN"
KINDS = {PLAIN: ours_features, ECN: ours_rerank_scores("ecn")}
_ONCE = 500_000  # galleries of so many images are evaluated once, with compiling
_EXACT_ECN = 100_000  # ECN's exact search grows by the square: 100 times as long for a million


@dataclasses.dataclass(frozen=True)
class Point:
    """What is evaluated: images in the gallery, numbers in a descriptor, virtual devices."""

    gallery: int = MARKET
    numbers: int = 512
    devices: int = 1


AXES: dict[str, tuple[int, ...]] = {
    "gallery": (20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000),
    "numbers": (128, 512, 2048, 4096, 15_360),
    "devices": (1, 2, 3, 4),
}
LABELS = {"gallery": "gallery images", "numbers": "numbers in a descriptor", "devices": "devices"}


def measure(kind: str, point: Point, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate in this process."""
    case = Case(kind, "ours", KINDS[kind], point.gallery, point.numbers)
    data = make_input(case, args.quick)
    first = run_once(case, data)
    more = args.repeats if point.gallery < _ONCE else 0
    runs = [run_once(case, data) for _ in range(more)] or [first]
    best = {name: min(run[name] for run in runs) for name in ("seconds", "cpu")}
    return {**best, "peak_gb": first["peak_gb"], "check": first["check"]}


def spawn(kind: str, point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate in a process of its own, which has so many devices."""
    request = json.dumps([kind, dataclasses.asdict(point)])
    words = [f"--child={request}", f"--repeats={args.repeats}", *["--quick"] * args.quick]
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={point.devices}"
    got = common.run_child("scripts.bench_growth", words, f"{kind}, {point}", XLA_FLAGS=flags)
    return {"kind": kind, **dataclasses.asdict(point), **got}


def measure_axis(axis: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All points of one figure, the evaluation without re-ranking first."""
    return [
        spawn(kind, Point(**{axis: value}), args)
        for kind in KINDS
        for value in AXES[axis]
        if kind == PLAIN or axis != "gallery" or value <= _EXACT_ECN
    ]


def format_axis(axis: str, measured: Sequence[dict[str, Any]]) -> str:
    header = (LABELS[axis], "what", "seconds", "CPU s", "peak GB", "mAP")
    rows = [
        [
            f"{got[axis]:,}",
            got["kind"],
            *(f"{got[name]:.2f}" for name in ("seconds", "cpu", "peak_gb")),
            f"{got['check']:.6f}",
        ]
        for got in measured
    ]
    return common.format_table(header, rows)


def plot_axis(axis: str, measured: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw time and memory, both axes logarithmic; of devices neither is."""
    extras.require("report", "a plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, marker, color in zip(KINDS, "os", ("tab:blue", "tab:orange"), strict=True):
        rows = [got for got in measured if got["kind"] == kind]
        values = [row[axis] for row in rows]
        left.plot(values, [row["seconds"] for row in rows], marker=marker, color=color, label=kind)
        cpu = [row["cpu"] for row in rows]
        left.plot(values, cpu, ":", color=color, label=f"{kind}: processor time")
        right.plot(values, [row["peak_gb"] for row in rows], marker=marker, color=color)
    for place, label in ((left, "seconds"), (right, "peak memory, GB")):
        place.set(xlabel=LABELS[axis], ylabel=label)
        if axis == "devices":
            place.set_ylim(bottom=0)
            place.set_xticks(AXES[axis])
        else:
            place.set(xscale="log", yscale="log")
        place.grid(visible=True, which="both", alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(f"{QUERIES:,} queries, {os.cpu_count()} cores")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    common.add_repeats(parser, 2)
    common.add_part(parser, tuple(AXES))
    parser.add_argument("--quick", action="store_true", help="1/50 of the images: a smoke test")
    parser.add_argument("--plots", type=pathlib.Path, help="directory for growth_AXIS.png")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    common.add_markdown(parser)
    args = parser.parse_args(argv)
    if args.child:
        kind, point = json.loads(args.child)
        print(json.dumps(measure(kind, Point(**point), args)))
        return 0
    machine = common.describe_machine()
    texts = [f"Measured by `scripts/bench_growth.py` on {machine}. {QUERIES:,} queries."]
    for axis in args.part:
        measured = measure_axis(axis, args)
        texts.append(format_axis(axis, measured))
        if args.plots:
            plot_axis(axis, measured, args.plots / f"growth_{axis}.png")
    common.publish("\n\n".join(texts), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

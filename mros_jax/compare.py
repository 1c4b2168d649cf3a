"""Show runs beside the paper's tables, and beside each other.

    python -m mros_jax.compare runs/market-IV-seed0 runs/market-IV-seed1 runs/market-III-seed0
    python -m mros_jax.compare runs/* --format=markdown
    python -m mros_jax.compare before/results.json after/results.json --paired

Runs that differ in nothing but their seed make one row: mean and standard deviation. A number that
was not measured as the paper's were says so in the last column.
"""

import argparse
import csv
import dataclasses
import io
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax import console
from mros_jax.errors import UserError
from mros_jax.retrieval import Result, bootstrap, descriptors
from mros_jax.runs import paper as papers
from mros_jax.runs.results import evaluate_features, get_scores, read_results
from mros_jax.runs.run import Run
from mros_jax.runs.tables import format_grid

COLUMNS = ("mAP", "rank1", "rank5", "rank10")
TITLES = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
# What decides no result: runs that differ only in these may be averaged.
_IRRELEVANT = ("seed", "report", "log_every_steps", "checkpoint_every_epochs")
_IRRELEVANT_OF_DATA = ("root", "cache_dir", "device_fraction")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One entry of one results.json; numbers in percent."""

    source: str
    system: str | None
    seed: int | None
    rerank: str | None
    values: dict[str, float]
    protocol: dict[str, Any]
    config: dict[str, Any] | None = None

    @property
    def group(self) -> str:
        """Equal for results that may be averaged: those that differ in seed and commit only."""
        fixed = {k: v for k, v in self.protocol.items() if k not in ("seed", "commit")}
        own = self.system if self.system is not None and self.seed is not None else self.source
        return json.dumps([own, self.rerank, fixed, self.config], sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table; numbers in percent, None where there is none."""

    table: int
    name: str
    source: str
    runs: int
    values: dict[str, float]
    deviations: dict[str, float]
    differences: dict[str, float]
    mismatches: list[str]
    note: str = ""  # of the paper's row


def load_results(path: str | pathlib.Path) -> dict[str, Any]:
    """Read a run's results.json, such a file itself, or evaluate a features file.

    Raises:
        NotFoundError: nothing there, or a run without results.
        UserError: the file is something else.
    """
    path = pathlib.Path(path)
    if path.suffix == ".npz":
        return evaluate_features(descriptors.load_features(path), dataset=None, reranks=())
    if path.is_dir():
        return Run(path).results
    return read_results(path)


def _load_config(path: str) -> dict[str, Any] | None:
    """What decides the result in a run's config; None where `path` is no run."""
    run = Run(path)
    if not run.exists():
        return None
    config = {key: value for key, value in run.config.items() if key not in _IRRELEVANT}
    data = config.get("dataset", {})
    config["dataset"] = {k: v for k, v in data.items() if k not in _IRRELEVANT_OF_DATA}
    return config


def _measure(source: str, results: Mapping[str, Any]) -> list[Measured]:
    run, config = results["run"], _load_config(source)
    return [
        Measured(
            source=source,
            system=run.get("system"),
            seed=run.get("seed"),
            rerank=entry["rerank"],
            values={name: 100 * value for name, value in get_scores(entry).items()},
            protocol=entry["protocol"],
            config=config,
        )
        for entry in results["results"]
    ]


def build_rows(measured: Sequence[Measured], paper: Mapping[str, Any]) -> list[Row]:
    """All tables: each row of the paper, and the runs that belong to it or to the table."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.group, []).append(one)
    rows = []
    for table in paper["table"]:
        reranked = "rerank" in table
        ours = [g for g in groups.values() if (g[0].rerank is not None) == reranked]
        placed = []
        for printed in table["row"]:
            values = {name: printed[name] for name in COLUMNS if name in printed}
            note = printed.get("note", "")
            rows.append(Row(table["number"], printed["name"], "paper", 1, values, {}, {}, [], note))
            for group in ours:
                if group[0].system is not None and group[0].system == printed.get("system"):
                    rows.append(_make_row(group, printed, table, paper, values))
                    placed.append(group)
        reference = {name: table["row"][-1].get(name) for name in COLUMNS}
        reference = {name: value for name, value in reference.items() if value is not None}
        if not table.get("own_systems_only"):
            last = table["row"][-1]
            rows += [_make_row(g, last, table, paper, reference) for g in ours if g not in placed]
    return rows


def _make_row(
    group: Sequence[Measured],
    printed: Mapping[str, Any],
    table: Mapping[str, Any],
    paper: Mapping[str, Any],
    reference: Mapping[str, float],
) -> Row:
    first = group[0]
    columns = {
        name: [one.values[name] for one in group]
        for name in COLUMNS
        if all(name in one.values for one in group)
    }
    values = {name: statistics.fmean(column) for name, column in columns.items()}
    deviations = (
        {name: statistics.stdev(column) for name, column in columns.items()}
        if len(group) > 1
        else {}
    )
    label = f"ours, {first.system}" if first.system else "ours"
    return Row(
        table=table["number"],
        name=label + (f" + {first.rerank}" if first.rerank else ""),
        source=" ".join(one.source for one in group),
        runs=len(group),
        values=values,
        deviations=deviations,
        differences={name: values[name] - reference[name] for name in reference if name in values},
        mismatches=papers.find_mismatches(first.protocol, paper, table, printed)
        + papers.find_config_mismatches(first.config, paper),
    )


def _cell(row: Row, name: str) -> str:
    if name not in row.values:
        return "-"
    text = f"{row.values[name]:.1f}" if row.source == "paper" else f"{row.values[name]:.2f}"
    if name in row.deviations:
        text += f" ± {row.deviations[name]:.2f}"
    if name in row.differences:
        text += f" ({row.differences[name]:+.1f})"
    return text


def _note(row: Row) -> str:
    if row.source == "paper":
        return row.note
    mean = f"mean of {row.runs} seeds: " if row.runs > 1 else ""
    mismatch = f". NOT COMPARABLE: {'; '.join(row.mismatches)}" if row.mismatches else ""
    return mean + row.source + mismatch


def format_rows(rows: Sequence[Row], paper: Mapping[str, Any], style: str) -> str:
    """Tables as "text", "markdown" or "csv".

    In parentheses: the difference from the paper, in points.
    """
    if style == "csv":
        return _format_csv(rows)
    parts = []
    for table in paper["table"]:
        head = ["", *(TITLES[name] for name in COLUMNS), "note"]
        cells = [
            [row.name, *(_cell(row, name) for name in COLUMNS), _note(row)]
            for row in rows
            if row.table == table["number"]
        ]
        title = f"Table {table['number']}. {table['title']}"
        heading = f"### {title}" if style == "markdown" else title
        parts.append(f"{heading}\n\n{format_grid([head, *cells], markdown=style == 'markdown')}")
    return "\n\n".join(parts)


def _format_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds = ("", "_std", "_difference")
    numbers = [f"{name}{kind}" for name in COLUMNS for kind in kinds]
    writer.writerow(["table", "name", "source", "runs", *numbers, "mismatches"])
    for row in rows:
        fields = (row.values, row.deviations, row.differences)
        cells = [
            f"{field[name]:.4f}" if name in field else "" for name in COLUMNS for field in fields
        ]
        mismatches = "; ".join(row.mismatches)
        writer.writerow([row.table, row.name, row.source, row.runs, *cells, mismatches])
    return out.getvalue().rstrip("\n")


def compare_pair(
    sources: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    *,
    samples: int,
    by: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Paired test of the second results against the first, ranking by ranking.

    Raises:
        UserError: not two results, nothing in common, or results of different queries.
    """
    if len(results) != 2:
        raise UserError(f"a paired test needs two results, got {len(results)}")
    first, second = ({e["name"]: e for e in r["results"]} for r in results)
    names = [name for name in first if name in second]
    if not names:
        raise UserError(f"{' and '.join(sources)} have no ranking of the same name")
    rows = []
    for name in names:
        tested = bootstrap.compare_paired(
            Result.from_dict(first[name]),
            Result.from_dict(second[name]),
            rng=np.random.default_rng(seed),
            samples=samples,
            by=by,
        )
        rows += [{"ranking": name, **dataclasses.asdict(difference)} for difference in tested]
    return rows


def _format_pair(rows: Sequence[Mapping[str, Any]], sources: Sequence[str], style: str) -> str:
    head = ["ranking", "metric", "difference", "95 % interval", "p"]
    cells = [
        [
            row["ranking"],
            row["metric"],
            f"{100 * row['difference']:+.2f}",
            f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}",
            f"{row['p_value']:.4f}",
        ]
        for row in rows
    ]
    if style == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([list(rows[0]), *(r.values() for r in rows)])
        return out.getvalue().rstrip("\n")
    grid = format_grid([head, *cells], markdown=style == "markdown")
    return grid if style == "markdown" else f"{sources[1]} minus {sources[0]}, in points\n\n{grid}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.compare", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, results.json, or features .npz"
    )
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--paper", help="file with other tables than those of the MROS paper")
    parser.add_argument(
        "--paired", action="store_true", help="test the second RUN against the first"
    )
    parser.add_argument("--by", choices=bootstrap.UNITS, default="identity", help="for --paired")
    parser.add_argument(
        "--samples", type=console.count, default=10000, help="resamples for --paired"
    )
    parser.add_argument("--seed", type=int, default=0, help="for --paired")
    args = parser.parse_args(argv)
    results = [load_results(run) for run in args.runs]
    if args.paired:
        tested = compare_pair(args.runs, results, samples=args.samples, by=args.by, seed=args.seed)
        print(_format_pair(tested, args.runs, args.format))
        return 0
    paper = papers.load_tables(args.paper)
    measured = [m for run, r in zip(args.runs, results, strict=True) for m in _measure(run, r)]
    print(format_rows(build_rows(measured, paper), paper, args.format))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

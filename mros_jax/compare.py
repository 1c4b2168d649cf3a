"""Runs beside the paper's tables, and beside each other.

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
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax.evaluate import FORMAT, evaluate_features
from mros_jax.retrieval import Result, bootstrap, descriptors

COLUMNS = ("mAP", "rank1", "rank5", "rank10")
TITLES = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
PAPER = pathlib.Path(__file__).resolve().parents[1] / "third_party" / "paper_results.toml"


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


def load_results(path: str | pathlib.Path) -> dict[str, Any]:
    """Read a run's results.json, such a file itself, or evaluate a features file.

    Raises:
        FileNotFoundError: nothing there, or a run without results.
        ValueError: the file is something else.
    """
    path = pathlib.Path(path)
    if path.suffix == ".npz":
        return evaluate_features(descriptors.load_features(path), dataset=None, reranks=())
    if path.is_dir():
        if not (path / "results.json").exists():
            raise FileNotFoundError(
                f"{path} has no results.json: let the training end, or run python -m "
                f"mros_jax.evaluate --checkpoint {path} --out {path / 'results.json'}"
            )
        path = path / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        results = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or "results" not in results or "run" not in results:
        raise ValueError(f"{path} is no results.json: it has no 'run' and 'results'")
    if results.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {results.get('format')!r}; this version reads {FORMAT}"
        )
    return results


def _load_config(run: str) -> dict[str, Any] | None:
    """What decides the result in a run's config: all but the seed, paths and logging."""
    path = pathlib.Path(run) / "config.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text())
    for name in ("seed", "report", "log_every_steps", "checkpoint_every_epochs"):
        config.pop(name, None)
    for name in ("root", "cache_dir", "device_fraction"):
        config.get("dataset", {}).pop(name, None)
    return config


def _measure(source: str, results: Mapping[str, Any]) -> list[Measured]:
    run, config = results["run"], _load_config(source)
    measured = []
    for entry in results["results"]:
        cmc = entry["cmc"]
        values = {"mAP": 100 * entry["mAP"]}
        values |= {f"rank{k}": 100 * cmc[k - 1] for k in (1, 5, 10) if k <= len(cmc)}
        measured.append(
            Measured(
                source=source,
                system=run["system"],
                seed=run["seed"],
                rerank=entry["rerank"],
                values=values,
                protocol=entry["protocol"],
                config=config,
            )
        )
    return measured


def find_mismatches(
    protocol: Mapping[str, Any], paper: Mapping[str, Any], table: Mapping[str, Any]
) -> list[str]:
    """What makes a number another measurement than the paper's: "what: here, not there"."""
    got = dict(protocol)
    # Whether junk is dropped first or later, the plain scores are the same: the sum must agree.
    got["num_gallery_and_junk"] = protocol["num_gallery"] + protocol["num_junk"]
    found = [
        f"{name}: {got.get(name)}, not {wanted}"
        for name, wanted in paper["protocol"].items()
        if got.get(name) != wanted
    ]
    if protocol["rerank"] != table.get("rerank"):
        found.append(f"rerank: {protocol['rerank']}, not {table.get('rerank')}")
    elif table.get("rerank"):
        options = protocol["rerank_options"]
        found += [
            f"{name}: {options.get(name)}, not {wanted}"
            for name, wanted in table["rerank_options"].items()
            if options.get(name) != wanted
        ]
    return found


def _find_model_mismatches(config: Mapping[str, Any] | None, paper: Mapping[str, Any]) -> list[str]:
    if config is None:
        return []
    model = config.get("network", {})
    return [
        f"{name}: {model.get(name)}, not {wanted}"
        for name, wanted in paper["model"].items()
        if model.get(name) != wanted
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
            rows.append(Row(table["number"], printed["name"], "paper", 1, values, {}, {}, []))
            for group in ours:
                own = group[0].system
                if table["number"] == 1 and own is not None and own == printed.get("system"):
                    rows.append(_make_row(group, table, paper, values))
                    placed.append(group)
        reference = {name: table["row"][-1].get(name) for name in COLUMNS}
        reference = {name: value for name, value in reference.items() if value is not None}
        if table["number"] != 1:
            rows += [_make_row(g, table, paper, reference) for g in ours if g not in placed]
    return rows


def _make_row(
    group: Sequence[Measured],
    table: Mapping[str, Any],
    paper: Mapping[str, Any],
    reference: Mapping[str, float],
) -> Row:
    first = group[0]
    known = [name for name in COLUMNS if all(name in one.values for one in group)]
    columns = {name: [one.values[name] for one in group] for name in known}
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
        differences={n: values[n] - reference[n] for n in reference if n in values},
        mismatches=find_mismatches(first.protocol, paper, table)
        + _find_model_mismatches(first.config, paper),
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
        return ""
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
        if style == "markdown":
            lines = [f"### {title}", "", *map(_markdown_line, [head, ["---"] * len(head), *cells])]
        else:
            widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
            lines = [title, ""]
            for line in [head, *cells]:
                padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
                lines.append("  ".join(padded).rstrip())
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
        ValueError: not two results, nothing in common, or results of different queries.
    """
    if len(results) != 2:
        raise ValueError(f"a paired test needs two results, got {len(results)}")
    first, second = ({e["name"]: e for e in r["results"]} for r in results)
    names = [name for name in first if name in second]
    if not names:
        raise ValueError(f"{' and '.join(sources)} have no ranking of the same name")
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
    if style == "markdown":
        return "\n".join(map(_markdown_line, [head, ["---"] * len(head), *cells]))
    lines = [f"{sources[1]} minus {sources[0]}, in points", ""]
    return "\n".join(
        lines + [f"{a:14}{b:8}{c:>11}{d:>20}{e:>9}" for a, b, c, d, e in [head, *cells]]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.compare", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, results.json, or features .npz"
    )
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--paper", default=str(PAPER), help="file with the paper's tables")
    parser.add_argument(
        "--paired", action="store_true", help="test the second RUN against the first"
    )
    parser.add_argument("--by", choices=bootstrap.UNITS, default="identity", help="for --paired")
    parser.add_argument("--samples", type=int, default=10000, help="resamples for --paired")
    parser.add_argument("--seed", type=int, default=0, help="for --paired")
    args = parser.parse_args(argv)
    try:
        results = [load_results(run) for run in args.runs]
        if args.paired:
            tested = compare_pair(
                args.runs, results, samples=args.samples, by=args.by, seed=args.seed
            )
            print(_format_pair(tested, args.runs, args.format))
            return 0
        if not pathlib.Path(args.paper).exists():
            raise FileNotFoundError(
                f"{args.paper} does not exist; --paper names the file (third_party/"
                "paper_results.toml in the project's repository)"
            )
        paper = tomllib.loads(pathlib.Path(args.paper).read_text())
        measured = [m for run, r in zip(args.runs, results, strict=True) for m in _measure(run, r)]
        print(format_rows(build_rows(measured, paper), paper, args.format))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

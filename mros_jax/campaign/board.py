"""The table of a campaign: accuracy and cost of each system beside what was published."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax.campaign.costs import Cost, load_cost
from mros_jax.campaign.jobs import Job, Ledger
from mros_jax.campaign.summary import INTERVAL, Score, describe_protocol, score
from mros_jax.campaign.systems import System
from mros_jax.errors import UserError
from mros_jax.runs import paper as papers
from mros_jax.runs.tables import format_grid


@dataclasses.dataclass(frozen=True)
class Line:
    """A system in the table.

    Attributes:
        system: its name.
        seeds: those whose runs are complete.
        scores: of the plain ranking, as its config tests, by the keys of `papers.METRICS`.
        protocol: that these were measured with.
        published: its row in `mros_jax/runs/paper_results.toml` without re-ranking, if it has one.
        minutes: mean time of a run.
        cost: what it costs, if that was measured.
        missing: seed -> why there is no result of it.
    """

    system: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Score]
    protocol: Mapping[str, Any]
    published: Mapping[str, Any]
    minutes: float | None
    cost: Cost | None
    missing: Mapping[int, str]


def make_lines(
    systems: Sequence[System], jobs: Sequence[Job], ledger: Ledger, paper: Mapping[str, Any]
) -> list[Line]:
    """What there is of each system, whatever is still missing."""
    lines = []
    for system in systems:
        entries, seeds, minutes, missing = [], [], [], {}
        own = [job for job in jobs if job.system == system]
        for job in own:
            why = ledger.failure(job.name)
            try:
                if why is None and job.is_complete():
                    entries.append(job.run.rankings[0])
                    seeds.append(job.seed)
                    minutes.append(ledger.seconds(job.name) / 60)
                    continue
            except UserError as error:
                why = str(error)
            missing[job.seed] = why or "not trained yet"
        published = papers.find_row(system.name, None, paper)
        lines.append(
            Line(
                system=system.name,
                seeds=tuple(seeds),
                scores=score(entries) if entries else {},
                protocol=entries[0]["protocol"] if entries else {},
                published=published[1] if published else {},
                minutes=sum(minutes) / len(minutes) if any(minutes) else None,
                cost=load_cost(system, own[0].folder),
                missing=missing,
            )
        )
    return lines


def format_lines(lines: Sequence[Line], *, markdown: bool) -> str:
    """Two tables, of accuracy and of cost, as text or Markdown, and what is missing."""
    title = "### {}" if markdown else "{}"
    head = ["system", "seeds", *papers.METRICS, "published mAP / Rank-1", "published with"]
    accuracy = [head, *(_describe_accuracy(line) for line in lines)]
    parts = [
        f"{title.format('Accuracy')}, in percent. {INTERVAL}",
        format_grid(accuracy, markdown=markdown),
    ]
    if minutes := sum((line.minutes or 0.0) * len(line.seeds) for line in lines):
        parts.append(f"These runs took {minutes:.0f} min in all, one after another.")
    cells = list_cost_cells(lines)
    if cells[1:]:
        devices = sorted({line.cost.device for line in lines if line.cost is not None})
        parts += [
            f"{title.format('Cost')}, on {' and '.join(devices)}. Multiply-adds are of one pass of "
            "one image; descriptors/s count all passes of a test.",
            format_grid(cells, markdown=markdown),
        ]
    if any(line.missing for line in lines):
        bullet = "- " if markdown else "  "
        absent = [
            f"{bullet}{line.system}, seed {seed}: {' '.join(why.split())}"
            for line in lines
            for seed, why in line.missing.items()
        ]
        parts += [title.format("Missing"), "\n".join(absent)]
    return "\n\n".join(parts)


def format_score(value: Score | None, digits: int = 1) -> str:
    """Mean and interval; "-" where there is none."""
    if value is None:
        return "-"
    mean, low, high = (f"{x:.{digits}f}" for x in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _describe_accuracy(line: Line) -> list[str]:
    published = line.published
    numbers = [format(published[key], "g") if key in published else "-" for key in ("mAP", "rank1")]
    return [
        line.system,
        str(len(line.seeds)) + f" of {len(line.seeds) + len(line.missing)}" * bool(line.missing),
        *(format_score(line.scores.get(key)) for key in papers.METRICS.values()),
        " / ".join(numbers) if published else "-",
        describe_protocol(published.get("protocol", {})),
    ]


def list_cost_cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Head and cells of the table of costs, of the systems that were measured."""
    head = (
        *("system", "parameters", "multiply-adds", "passes", "descriptor"),
        *("training images/s", "descriptors/s", "peak memory", "a run"),
    )
    return [head, *(_describe_cost(line, line.cost) for line in lines if line.cost is not None)]


def _describe_cost(line: Line, cost: Cost) -> tuple[str, ...]:
    memory = cost.host_bytes if cost.device_bytes is None else cost.device_bytes
    return (
        line.system,
        f"{cost.parameters / 1e6:.2f} M",
        f"{cost.multiply_adds / 1e6:,.1f} M",
        str(cost.passes),
        str(cost.descriptor),
        f"{cost.train_speed:.0f}",
        f"{cost.extract_speed:.0f}",
        f"{memory / 1e9:.2f} GB",
        "-" if line.minutes is None else f"{line.minutes:.1f} min",
    )


def format_csv(lines: Sequence[Line]) -> str:
    """One row a system, with everything that the two tables have."""
    costs = [f.name for f in dataclasses.fields(Cost) if f.name != "words"]
    scores = [f"{k}{end}" for k in papers.METRICS.values() for end in ("", "_std", "_low", "_high")]
    published = [f"published_{key}" for key in papers.METRICS.values()]
    head = ["system", "seeds", *scores, *published, "published_protocol", "minutes"]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*head, *costs, "missing"], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        row: dict[str, Any] = {"system": line.system, "seeds": " ".join(map(str, line.seeds))}
        for key, value in line.scores.items():
            row |= {key: f"{value.mean:.4f}"}
            ends = {"_std": value.deviation, "_low": value.low, "_high": value.high}
            row |= {f"{key}{end}": f"{x:.4f}" for end, x in ends.items() if x is not None}
        for key in papers.METRICS.values():
            row[f"published_{key}"] = line.published.get(key)
        row["published_protocol"] = describe_protocol(line.published.get("protocol", {}))
        row["minutes"] = None if line.minutes is None else f"{line.minutes:.3f}"
        if line.cost is not None:
            row |= {name: getattr(line.cost, name) for name in costs}
        row["missing"] = "; ".join(f"seed {seed}: {why}" for seed, why in line.missing.items())
        writer.writerow(row)
    return out.getvalue()

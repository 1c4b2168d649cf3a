"""The report of a reproduction: as text, Markdown, CSV, JSON and a page."""

import collections
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax import extras
from mros_jax.campaign import board, chart, evaluations, summary, verdicts
from mros_jax.campaign.imported import Imported
from mros_jax.campaign.jobs import Job, Ledger
from mros_jax.campaign.systems import System
from mros_jax.files import write_atomically
from mros_jax.runs import provenance

log = logging.getLogger(__name__)


def write_results(
    out: pathlib.Path,
    systems: Sequence[System],
    jobs: Sequence[Job],
    ledger: Ledger,
    paper: Mapping[str, Any],
    weights: Sequence[Imported] = (),
) -> str:
    """Write `reproduce.txt`, `.md`, `.csv`, `.json` and `.html` of what there is.

    Args:
        out: the campaign's folder.
        systems: that take part.
        jobs: theirs.
        ledger: of the folder.
        paper: the published rows.
        weights: checkpoints of peers that take part.

    Returns:
        The text.
    """
    contestants = evaluations.collect(systems, jobs, ledger, weights)
    found = verdicts.make_verdicts(contestants, paper)
    common = verdicts.score_common(contestants, paper)
    lines = board.make_lines(systems, jobs, ledger, paper)
    record = {"commit": provenance.get_commit(), "folder": str(out.absolute())}
    missing = sum(len(line.missing) for line in lines)
    record["runs"] = f"{len(jobs) - missing} of {len(jobs)} complete"
    contents = {
        style: "\n\n".join(
            [
                verdicts.format_verdicts(found, common, markdown=markdown),
                *([board.format_lines(lines, markdown=markdown)] if lines else []),
                ", ".join(f"{name} {value}" for name, value in record.items()),
            ]
        )
        + "\n"
        for style, markdown in (("txt", False), ("md", True))
    }
    contents["csv"] = verdicts.format_csv(found)
    contents["json"] = json.dumps(
        {
            **record,
            "interval": summary.INTERVAL,
            "verdicts": verdicts.to_dicts(found),
            "common": {
                ranking: {
                    name: {key: _to_dict(value) for key, value in scores.items()}
                    for name, scores in by_system.items()
                }
                for ranking, by_system in common.items()
            },
            "missing": {line.system: dict(line.missing) for line in lines if line.missing},
        },
        indent=2,
    )
    if lacking := extras.find_missing("report", "The page of the report"):
        log.warning("%s", lacking)
    else:
        contents["html"] = _make_page(found, common, lines, record)
    for style, content in contents.items():
        with write_atomically(out / f"reproduce.{style}") as file:
            file.write(content)
    return contents["txt"]


def _to_dict(value: summary.Score) -> dict[str, Any]:
    ends = {"low": value.low, "high": value.high}
    return {"mean": value.mean, "std": value.deviation, "values": value.values, **ends}


def _make_page(
    found: Sequence[verdicts.Verdict],
    common: Mapping[str, Mapping[str, Any]],
    lines: Sequence[board.Line],
    record: Mapping[str, str | None],
) -> str:
    from mros_jax.inspection.markup import make_environment  # jinja2 is an extra

    counted = collections.Counter(
        verdict.judge(metric) or "not compared" for verdict in found for metric in verdict.published
    )
    template = make_environment("mros_jax.campaign", "mros_jax.report").get_template("results.html")
    return template.render(
        head=verdicts.VERDICT_HEAD,
        cells=verdicts.list_cells(found),
        counted=counted,
        common=verdicts.list_common_cells(common),
        costs=board.list_cost_cells(lines),
        missing=[(line.system, line.missing) for line in lines if line.missing],
        notes=verdicts.list_notes(found),
        chart=chart.draw(lines),
        interval=summary.INTERVAL,
        record=record,
    )

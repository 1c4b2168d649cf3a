"""What runs say of published numbers: reproduced, below, above, or not comparable."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax.campaign.board import format_score
from mros_jax.campaign.evaluations import Contestant, Protocol, list_common
from mros_jax.campaign.summary import INTERVAL, Score, describe_protocol, score
from mros_jax.runs import paper as papers
from mros_jax.runs.tables import format_grid

_TITLES = {key: title for title, key in papers.METRICS.items()}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A published row beside what was measured of its system, in percent.

    Attributes:
        system: its name.
        table: number of the table in `mros_jax/runs/paper_results.toml`.
        name: of the row.
        protocol: that it was measured with, in words.
        published: its numbers, by the keys of `papers.METRICS`.
        scores: ours.
        seeds: of ours; "-" of a run that was trained elsewhere.
        reasons: why the two are not to be compared; none: they are.
        note: of the row.
    """

    system: str
    table: int
    name: str
    protocol: str
    published: Mapping[str, float]
    scores: Mapping[str, Score]
    seeds: tuple[str, ...]
    reasons: tuple[str, ...]
    note: str

    def difference(self, metric: str) -> float | None:
        """Ours minus the published, in points; None where one is not there."""
        if metric not in self.published or metric not in self.scores:
            return None
        return self.scores[metric].mean - self.published[metric]

    def judge(self, metric: str) -> str | None:
        """Of a metric "reproduced", "below" or "above"; None where the two are not compared."""
        if self.reasons or self.difference(metric) is None:
            return None
        ours, theirs = self.scores[metric], self.published[metric]
        if ours.low <= theirs <= ours.high:
            return "reproduced"
        return "below" if theirs > ours.high else "above"

    @property
    def text(self) -> str:
        """The verdict in words: the metrics that it is of, where they do not agree."""
        if self.reasons:
            return f"not comparable: {'; '.join(self.reasons)}"
        words: dict[str, list[str]] = {}
        for metric in self.published:
            if word := self.judge(metric):
                words.setdefault(word, []).append(_TITLES[metric])
        if len(words) == 1:
            return next(iter(words))
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in words.items())


def make_verdicts(contestants: Sequence[Contestant], paper: Mapping[str, Any]) -> list[Verdict]:
    """A verdict for each published row of each system, in the order of the tables.

    Args:
        contestants: of `evaluations.collect`.
        paper: as `mros_jax.runs.paper.load_tables` returns it.
    """
    verdicts = []
    for one in contestants:
        for table, row in papers.find_rows(one.system, paper):
            found = one.find(Protocol.of(paper, table, row))
            reasons = []
            if not found:
                lack = "could be evaluated so" if one.made else "has come to its end"
                reasons.append(f"no run {lack}")
            else:
                seed, entry = next(iter(found.items()))
                reasons += one.changes
                reasons += papers.find_mismatches(entry["protocol"], paper, table, row)
                reasons += papers.find_config_mismatches(one.made[seed].run.config, paper)
            verdicts.append(
                Verdict(
                    system=one.label,
                    table=table["number"],
                    name=row["name"],
                    protocol=_describe(row, table),
                    published={key: row[key] for key in _TITLES if key in row},
                    scores=score(list(found.values())) if found else {},
                    seeds=tuple(found),
                    reasons=tuple(reasons),
                    note=row.get("note", ""),
                )
            )
    return sorted(verdicts, key=lambda verdict: verdict.table)


def _describe(row: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    words = [table.get("rerank", ""), describe_protocol(row.get("protocol", {}))]
    return ", ".join(filter(None, words)) or "plain"


def score_common(
    contestants: Sequence[Contestant], paper: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Score]]]:
    """Ranking of the common protocol -> system -> its scores, of those that have any."""
    return {
        ranking: {
            one.label: score(list(found.values()))
            for one in contestants
            if (found := one.find(protocol))
        }
        for ranking, protocol in list_common(paper).items()
    }


VERDICT_HEAD = (
    *("table", "row", "system", "seeds", "measured with"),
    *("metric", "ours", "published", "difference", "verdict"),
)


def list_cells(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """The cells of `VERDICT_HEAD`, a line for each published number."""
    rows: list[tuple[str, ...]] = []
    for verdict in verdicts:
        for metric, theirs in verdict.published.items():
            ours, difference = verdict.scores.get(metric), verdict.difference(metric)
            first = metric == next(iter(verdict.published))
            named = (
                str(verdict.table),
                verdict.name,
                verdict.system,
                " ".join(verdict.seeds) or "-",
            )
            judged = verdict.judge(metric)
            rows.append(
                (
                    *(named if first else ("", "", "", "")),
                    verdict.protocol if first else "",
                    _TITLES[metric],
                    format_score(ours, 2),
                    f"{theirs:g}",
                    "-" if difference is None else f"{difference:+.2f}",
                    judged or (verdict.text if first else "as above"),
                )
            )
    return rows


def list_common_cells(common: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Head and cells of the table of the common protocol."""
    rows: list[tuple[str, ...]] = [("ranking", "system", *papers.METRICS)]
    for ranking, systems in common.items():
        for name, scores in systems.items():
            cells = (format_score(scores.get(key), 2) for key in papers.METRICS.values())
            rows.append((ranking, name, *cells))
    return rows


def list_notes(verdicts: Sequence[Verdict]) -> list[str]:
    """What there is to know of published rows."""
    return [f"{v.name} (table {v.table}): {v.note}" for v in verdicts if v.note]


def format_verdicts(
    verdicts: Sequence[Verdict], common: Mapping[str, Mapping[str, Any]], *, markdown: bool
) -> str:
    """All verdicts, the common protocol and the notes, as text or Markdown."""
    title = "### {}" if markdown else "{}"
    parts = [
        f"{title.format('Ours and published')}, in percent. {INTERVAL} Reproduced: the published "
        "number lies in it; below, above: ours does not reach it, or is better.",
        format_grid([VERDICT_HEAD, *list_cells(verdicts)], markdown=markdown),
    ]
    cells = list_common_cells(common)
    if cells[1:]:
        parts += [
            f"{title.format('One protocol for all')}: cosine distance of descriptors of unit "
            "length, whole images, standard AP.",
            format_grid(cells, markdown=markdown),
        ]
    if notes := list_notes(verdicts):
        bullet = "- " if markdown else "  "
        parts += [title.format("Notes on published numbers"), "\n".join(bullet + n for n in notes)]
    return "\n\n".join(parts)


def to_dicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """All there is of each verdict, for JSON."""
    return [
        {
            **dataclasses.asdict(verdict),
            "differences": {key: verdict.difference(key) for key in verdict.published},
            "verdicts": {key: verdict.judge(key) for key in verdict.published},
            "text": verdict.text,
        }
        for verdict in verdicts
    ]


def format_csv(verdicts: Sequence[Verdict]) -> str:
    """A line for each published number."""
    out = io.StringIO()
    head = ["table", "row", "system", "seeds", "protocol", "metric", "ours", "std", "low", "high"]
    head += ["published", "difference", "verdict", "reasons", "note"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for verdict in verdicts:
        for metric, theirs in verdict.published.items():
            ours = verdict.scores.get(metric)
            numbers = (ours.mean, ours.deviation, ours.low, ours.high) if ours else 4 * (None,)
            shown = ["" if x is None else f"{x:.4f}" for x in numbers]
            difference = verdict.difference(metric)
            named = [verdict.table, verdict.name, verdict.system]
            named += [" ".join(verdict.seeds), verdict.protocol, metric]
            last = ["" if difference is None else f"{difference:.4f}"]
            last += [verdict.judge(metric) or "not comparable", "; ".join(verdict.reasons)]
            writer.writerow([*named, *shown, theirs, *last, verdict.note])
    return out.getvalue()

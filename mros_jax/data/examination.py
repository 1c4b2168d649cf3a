"""All checks of a data set together: those that are free, and those that read every image."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax.data.datasets import checks, records
from mros_jax.data.datasets.checks import Finding
from mros_jax.data.splits import Dataset
from mros_jax.errors import UserError

log = logging.getLogger(__name__)

_NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the doctor has to say.

    Attributes:
        dataset: its name.
        options: that it was read with.
        splits: counts of each split, see `checks.summarize`.
        sizes: image sizes of each split.
        findings: errors first.
    """

    dataset: str
    options: Mapping[str, Any]
    splits: dict[str, dict[str, Any]]
    sizes: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no finding of level "fatal" or "error"."""
        return all(finding.level not in ("fatal", "error") for finding in self.findings)

    def to_json(self) -> str:
        """Return everything, with all names, as JSON."""
        return json.dumps({"healthy": self.healthy, **dataclasses.asdict(self)}, indent=2)


def check_names(dataset: Dataset, *, identities: int, images: int) -> tuple[Finding, ...]:
    """Check names and numbers, without reading an image; training runs this first.

    What does not prevent training goes to the log.

    Args:
        dataset: the data set.
        identities: P of the batch.
        images: K of the batch.

    Returns:
        What was found and does not prevent training.

    Raises:
        UserError: training or its evaluation cannot run; all such findings are named.
    """
    findings = _examine_names(dataset, identities, images)
    fatal = [to_text(finding) for finding in findings if finding.level == "fatal"]
    if fatal:
        raise UserError(
            f"data set {dataset.name!r} is not fit for training:\n  " + "\n  ".join(fatal)
        )
    for finding in findings:
        log.warning("data set %s: %s", dataset.name, to_text(finding))
    return findings


def examine(
    dataset: Dataset,
    *,
    identities: int,
    images: int,
    on_bad_image: str = "error",
    input_size: tuple[int, int] = (384, 128),
    cache_dir: str | os.PathLike[str] | None = None,
    num_threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Run all checks; read and decode every image.

    Args:
        dataset: the data set, read with `on_bad_image="skip"` so that all misnamed files are known.
        identities: P of the batch.
        images: K of the batch.
        on_bad_image: what training will do: with "error", misnamed and unreadable files are errors;
            with "skip" they are warnings, and everything else is checked without them.
        input_size: height and width of the network's input.
        cache_dir: where training will keep decoded images; None for the user's cache directory.
        num_threads: reading threads; by default one for each CPU.
        progress: show progress bars.
    """
    accepted = on_bad_image == "skip"
    look = checks.look_at_images(
        dataset,
        input_size=input_size,
        accepted=accepted,
        num_threads=num_threads,
        progress=progress,
    )
    counted = {split.name: checks.summarize(split) for split in dataset.splits}
    findings = [
        *checks.check_skipped(dataset, accepted=accepted),
        *look.findings,
        *checks.check_cache(look.decoded_bytes, cache_dir),
    ]
    lost = [name for name, readable in look.readable.items() if not readable.any()]
    findings += [Finding("fatal", "no image", f"{name}: no image can be read") for name in lost]
    if not lost:
        if accepted:
            dataset = _leave_out(dataset, look.readable)
        findings += _examine_names(dataset, identities, images)
    return Report(dataset.name, dataset.options, counted, look.sizes, _sort(findings))


def _leave_out(dataset: Dataset, readable: Mapping[str, np.ndarray]) -> Dataset:
    train, query, gallery = (
        split.select(np.flatnonzero(readable[split.name])) for split in dataset.splits
    )
    return dataclasses.replace(dataset, train=train, query=query, gallery=gallery)


def _examine_names(dataset: Dataset, identities: int, images: int) -> tuple[Finding, ...]:
    return _sort(
        (
            *checks.check_counts(dataset),
            *checks.check_overlap(dataset),
            *checks.check_batches(dataset, identities=identities, images=images),
            *checks.check_queries(dataset),
        )
    )


def _sort(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    order = ("fatal", "error", "warning", "note")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.level)))


def to_text(finding: Finding) -> str:
    """Put a finding into one line, with the first few names."""
    text = f"{finding.check}: {finding.message}"
    if finding.names:
        shown = ", ".join(finding.names[:_NAMES_SHOWN])
        more = len(finding.names) - _NAMES_SHOWN
        text += f": {shown}" + (f" and {more} more" if more > 0 else "")
    return text


def format_report(report: Report) -> str:
    """Format the report as a readable table."""
    chosen = "".join(f" {name}={value}" for name, value in report.options.items())
    lines = [f"data set {report.dataset}{chosen}", ""]
    record = records.DATASETS.get(report.dataset)
    published = record.counts(report.options) if record else {}
    rows: list[tuple[str, ...]] = [
        ("split", "images", "published", "identities", "published", "junk", "distractors")
    ]
    for name, counts in report.splits.items():
        expected = published.get(name)
        rows.append(
            (
                name,
                f"{counts['images']:,}",
                f"{expected.images:,}" if expected and expected.images else "-",
                f"{counts['identities']:,}",
                f"{expected.identities:,}" if expected else "-",
                f"{counts['junk']:,}",
                f"{counts['distractors']:,}",
            )
        )
    lines += [*_align(rows), ""]

    cameras = sorted({int(c) for counts in report.splits.values() for c in counts["cameras"]})
    rows = [("images (identities)", *(f"camera {camera}" for camera in cameras))]
    for name, counts in report.splits.items():
        cells = [counts["cameras"].get(str(camera)) for camera in cameras]
        rows.append(
            (name, *(f"{c['images']:,} ({c['identities']:,})" if c else "-" for c in cells))
        )
    lines += [*_align(rows), ""]

    if report.sizes:
        rows = [("height x width", "different", "smallest", "median", "largest")]
        for name, size in report.sizes.items():
            cells = [size.get(key) for key in ("smallest", "median", "largest")]
            rows.append(
                (name, str(size["different"]), *(f"{c[0]} x {c[1]}" if c else "-" for c in cells))
            )
        lines += [*_align(rows), ""]

    lines += [f"{finding.level.upper():8}{to_text(finding)}" for finding in report.findings]
    errors = sum(finding.level in ("fatal", "error") for finding in report.findings)
    found = len(report.findings) - errors
    lines.append(f"{errors or 'no'} errors, {found or 'no'} other findings")
    return "\n".join(lines)


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

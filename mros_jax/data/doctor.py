"""Dataset doctor: what is wrong with a data set, before a day of training tells.

    python -m mros_jax.data.doctor --dataset market1501 --root PATH
    python -m mros_jax.data.doctor --config configs/mros.py --config.dataset.root=PATH

Exit code 0: nothing wrong (warnings may be printed); 1: something is; 2: the data cannot be read.
"""

import dataclasses
import json
import logging
import sys
import warnings
from typing import Any

from absl import flags
from ml_collections import config_flags

from mros_jax.data.datasets import checks, sources
from mros_jax.data.datasets.checks import Finding
from mros_jax.data.datasets.splits import Dataset

_NAMES_SHOWN = 5
log = logging.getLogger("mros_jax.data.doctor")  # also where this file is __main__


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the doctor has to say.

    Attributes:
      dataset: its name.
      splits: counts per split, see `checks.summarise`.
      sizes: image sizes per split; empty if no image was read.
      findings: errors first.
    """

    dataset: str
    splits: dict[str, dict[str, Any]]
    sizes: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no finding of level "fatal" or "error"."""
        return all(finding.level not in ("fatal", "error") for finding in self.findings)

    def to_json(self) -> str:
        """Returns everything, with all names, as JSON."""
        return json.dumps({"healthy": self.healthy, **dataclasses.asdict(self)}, indent=2)


def check_cheap(dataset: Dataset, *, identities: int, images: int) -> tuple[Finding, ...]:
    """Checks names and numbers, without reading an image; training runs this first.

    What does not prevent training goes to the log.

    Args:
      dataset: the data set.
      identities: P of the batch.
      images: K of the batch.

    Returns:
      What was found and does not prevent training.

    Raises:
      ValueError: training or its evaluation cannot run; all such findings are named.
    """
    findings = _examine_names(dataset, identities, images)
    fatal = [_to_text(finding) for finding in findings if finding.level == "fatal"]
    if fatal:
        raise ValueError(
            f"data set {dataset.name!r} is not fit for training:\n  " + "\n  ".join(fatal)
        )
    for finding in findings:
        log.warning("data set %s: %s", dataset.name, _to_text(finding))
    return findings


def examine(
    dataset: Dataset,
    *,
    identities: int,
    images: int,
    num_threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Runs all checks; reads and decodes every image.

    Args:
      dataset: the data set.
      identities: P of the batch.
      images: K of the batch.
      num_threads: reading threads; by default one per CPU.
      progress: show progress bars.
    """
    of_images, sizes = checks.check_images(dataset, num_threads=num_threads, progress=progress)
    findings = (*_examine_names(dataset, identities, images), *of_images)
    return Report(
        dataset=dataset.name,
        splits={split.name: checks.summarise(split) for split in dataset.splits},
        sizes=sizes,
        findings=_sort(findings),
    )


def _examine_names(dataset: Dataset, identities: int, images: int) -> tuple[Finding, ...]:
    return _sort(
        (
            *checks.check_counts(dataset),
            *checks.check_overlap(dataset),
            *checks.check_batches(dataset, identities=identities, images=images),
            *checks.check_queries(dataset),
        )
    )


def _sort(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    order = ("fatal", "error", "warning", "note")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.level)))


def _to_text(finding: Finding) -> str:
    text = f"{finding.check}: {finding.message}"
    if finding.names:
        shown = ", ".join(finding.names[:_NAMES_SHOWN])
        more = len(finding.names) - _NAMES_SHOWN
        text += f": {shown}" + (f" and {more} more" if more > 0 else "")
    return text


def format_report(report: Report) -> str:
    """Returns the report as a readable table."""
    lines = [f"data set {report.dataset}", ""]
    published = checks.PUBLISHED.get(report.dataset, {})
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

    lines += [f"{finding.level.upper():8}{_to_text(finding)}" for finding in report.findings]
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


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("dataset", None, "Name of the data set.", flag_values=values)
    flags.DEFINE_string("root", None, "Directory with the data.", flag_values=values)
    flags.DEFINE_string("preset", None, "Size of the synthetic data set.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the synthetic data set.", flag_values=values)
    flags.DEFINE_bool("distractors_500k", False, "With Market's distractors.", flag_values=values)
    # Two: what a triplet needs. A config says how many a batch really has.
    flags.DEFINE_integer("identities", 2, "P: identities in a batch.", flag_values=values)
    flags.DEFINE_integer("images", 4, "K: images of each.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print JSON instead of a table.", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "Training config.", flag_values=values)
    try:
        rest = values(argv)
        if len(rest) > 1 or (values.config is None) == (values.dataset is None):
            raise flags.Error(f"give either --dataset or --config\n{__doc__}")
        name, root = values.dataset, values.root
        rendering = {"preset": values.preset, "seed": values.seed}
        identities, images = values.identities, values.images
        if values.config is not None:
            section = values.config.dataset
            name, root = section.name, section.root
            rendering = {"preset": section.preset, "seed": section.seed}
            identities, images = values.config.batch.identities, values.config.batch.images
        options: dict[str, Any] = rendering if name == "synthetic" else {}
        if values.distractors_500k:
            options["distractors_500k"] = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = sources.load_dataset(name, root, on_bad_image="skip", **options)
    except (flags.Error, OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    skipped = tuple(Finding("error", "misnamed files", str(warning.message)) for warning in caught)
    report = examine(dataset, identities=identities, images=images)
    report = dataclasses.replace(report, findings=_sort((*report.findings, *skipped)))
    print(report.to_json() if values.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))

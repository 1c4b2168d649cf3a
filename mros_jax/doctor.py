"""Data set doctor: what is wrong with a data set, before a day of training tells.

    python -m mros_jax.doctor --dataset market1501 --root PATH
    python -m mros_jax.doctor --config configs/mros.py --config.dataset.root=PATH

Exit code 0: nothing wrong (warnings may be printed); 1: something is; 2: the data cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.data.datasets import layouts, records, sources
from mros_jax.data.examination import Report, examine, to_text
from mros_jax.errors import UserError


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


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict | None]:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.doctor",
        description="Say what is wrong with a data set, before a day of training tells.",
        epilog="With --config FILE, and --config.FIELD=VALUE, everything is taken from a training "
        "config instead: data set, options, batch, input size.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", help=f"one of {', '.join(sorted(records.DATASETS))}")
    parser.add_argument("--root", help="directory with the data")
    parser.add_argument("--on_bad_image", help="what training will do: error (default) or skip")
    parser.add_argument("--cache_dir", help="where training will keep decoded images")
    # Two: what a triplet needs. A config says how many a batch really has.
    parser.add_argument("--identities", type=int, help="P: identities in a batch (default: 2)")
    parser.add_argument("--images", type=int, help="K: images of each (default: 4)")
    records.add_arguments(parser, records.DATASETS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config, rest = configs.parse_config(argv)
    args = parser.parse_args(rest)
    if (config is None) == (args.dataset is None):
        raise UserError("give either --dataset NAME or --config FILE; see --help")
    return args, config


def main(argv: Sequence[str] | None = None) -> int:
    """Examine a data set; see `--help`.

    Returns:
        0 if nothing is wrong, 1 if something is.
    """
    args, config = _parse(sys.argv[1:] if argv is None else argv)
    settings: dict[str, Any] = {"identities": 2, "images": 4}
    if config is not None:
        settings |= {"dataset": config.dataset.name, **config.dataset.to_dict()}
        settings |= {
            key: config.batch[key] for key in ("identities", "images") if key in config.batch
        }
        settings["input_size"] = (config.input.height, config.input.width)
    settings |= {key: value for key, value in vars(args).items() if value is not None}
    on_bad_image = settings.get("on_bad_image", "error")
    layouts.check_choice(on_bad_image)
    dataset = sources.load_dataset(
        settings["dataset"],
        settings.get("root"),
        on_bad_image="skip",
        **records.pick_options(settings),
    )
    report = examine(
        dataset,
        identities=settings["identities"],
        images=settings["images"],
        on_bad_image=on_bad_image,
        input_size=settings.get("input_size", (384, 128)),
        cache_dir=settings.get("cache_dir"),
    )
    print(report.to_json() if args.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(console.run(main))

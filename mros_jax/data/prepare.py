"""Prepare a data set: a published one as records, or one's own from tracks, tables and folders.

    python -m mros_jax.data.prepare --dataset market1501 --root PATH --out TFDS_DIR
    python -m mros_jax.data.prepare --format mot --root PATH --out DIR

Exit code 0: prepared; 1: prepared, and the doctor finds errors; 2: not prepared.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from mros_jax import console
from mros_jax.data.datasets import records, sources
from mros_jax.data.examination import examine, format_report
from mros_jax.data.own import preparation
from mros_jax.errors import UserError

# What a triplet needs, as the doctor's own defaults.
_IDENTITIES, _IMAGES = 2, 4


def _classes(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


# Options of one's own data: (name, type, help). Which format has which, its reader says.
_OWN: tuple[tuple[str, Any, str], ...] = (
    ("images", str, "directory that paths are relative to (default: that of the file)"),
    ("identity_key", str, "field with the identity (default: track_id)"),
    ("camera_key", str, "field with the camera (default: video_id)"),
    ("camera_pattern", str, "regular expression whose first group is the camera in a name"),
    ("shared_ids", bool, "an id is the same person in all cameras, not in its own only"),
    ("classes", _classes, "classes that are people, as 1,2 (default: 1 for mot, all for coco)"),
    ("min_confidence", float, "of a box that states one (default: 0)"),
    ("min_visibility", float, "of a box that states one, 0 to 1 (default: 0)"),
    ("every", console.count, "take each n-th frame (default: 1)"),
    ("min_height", console.count, "pixels of a box within its frame (default: 32)"),
    ("min_width", console.count, "pixels of a box within its frame (default: 16)"),
    ("min_images", console.count, "leave out identities with fewer (default: 2)"),
    ("pseudo_cameras", console.count, "cut tracks in time into so many (default: do not)"),
    ("test_fraction", float, "share of identities to test (default: 0.5)"),
    ("seed", int, "of the draw of identities and queries (default: 0)"),
    ("image_format", str, "of what is cut out: jpeg (quality 95, default) or png"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a data set; see `--help`.

    Returns:
        0, or 1 if the doctor finds errors in one's own data.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.data.prepare",
        description="Store a published data set as ArrayRecord, for TFDS and for this library; or "
        "make a data set of one's own people, in Market-1501's layout.",
        allow_abbrev=False,
    )
    names = sorted(record.name for record in records.DATASETS.values() if record.builder)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", choices=names)
    what.add_argument(
        "--format",
        choices=tuple(preparation.FORMATS),
        help="of one's own data: MOTChallenge's tracks, COCO-style JSON, a table, or a directory "
        "for each identity",
    )
    parser.add_argument("--root", required=True, help="where the data are")
    parser.add_argument("--out", required=True, help="directory to write: TFDS's, or a new one")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    records.add_arguments(parser, names)
    group = parser.add_argument_group("options of one's own data")
    for name, kind, text in _OWN:
        if kind is bool:
            group.add_argument(f"--{name}", action="store_const", const=True, help=text)
        else:
            group.add_argument(f"--{name}", type=kind, metavar="VALUE", help=text)
    args = vars(parser.parse_args(argv))
    own = {name: args.pop(name) for name, *_ in _OWN}
    own = {name: value for name, value in own.items() if value is not None}
    published = records.pick_options(args)
    if args["dataset"]:
        _refuse(own, "--format")
        from mros_jax.data.datasets.prepared import (
            prepare,  # TensorFlow Datasets are slow to import
        )

        bad = args["on_bad_image"]
        print(prepare(args["dataset"], args["root"], args["out"], on_bad_image=bad, **published))
        return 0
    _refuse(published, "--dataset")
    made = preparation.prepare_own(
        args["format"], args["root"], args["out"], on_bad_image=args["on_bad_image"], **own
    )
    print(*made.notes, sep="\n")
    print(f"written to {made.path}; to be read by the name folder\n")
    report = examine(
        sources.load_dataset("folder", made.path), identities=_IDENTITIES, images=_IMAGES
    )
    print(format_report(report))
    return 0 if report.healthy else 1


def _refuse(options: dict[str, Any], instead: str) -> None:
    if options:
        raise UserError(f"--{next(iter(options))} is an option of {instead} only")


if __name__ == "__main__":
    sys.exit(console.run(main))

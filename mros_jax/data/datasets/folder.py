"""Reader of one's own images: Market-1501's names, a table, or a directory for each person."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from mros_jax.data.datasets.layouts import (
    MARKET_PARTS,
    BadFiles,
    Entry,
    MissingDataError,
    OnBadImage,
    make_dataset,
    read_market_layout,
)
from mros_jax.data.listing import list_images
from mros_jax.data.splits import DISTRACTOR_PID, JUNK_PID, Dataset
from mros_jax.data.text import parse_whole, read_table
from mros_jax.errors import UserError

TABLE = "images.csv"
PERSON_PARTS = ("train", "query", "gallery")
_COLUMNS = ("path", "pid", "camid", "split")
# The camera, and the recording if wanted, in the name of a file: c1, cam02, Camera_3s1.
CAMERA = re.compile(r"(?<![a-z0-9])c(?:am(?:era)?)?[-_]?([0-9]+)(?:s([0-9]+))?", re.IGNORECASE)


def read_folder(root: pathlib.Path, *, on_bad_image: OnBadImage = "error") -> Dataset:
    """Read one's own images in one of three layouts, looked for in this order.

    - A CSV file with the columns path (relative to it), pid, camid, split ("train", "query" or
      "gallery") and, if wanted, sequence. Pids are whole numbers: people from 1 on, 0 for
      distractors, -1 for junk.
    - Market-1501's directories and names.
    - `train/`, `query/` and `gallery/` with a directory for each person, the camera as cN or camN
      in the file's name: `train/anna/c1_0001.jpg`. Directories named by whole numbers are pids;
      others are numbered from 1 in order of their names, equal names in all three being one person.

    Args:
        root: the directory, or a CSV file.
        on_bad_image: what to do about names and rows that cannot be read: "error" or "skip".

    Raises:
        MissingDataError: none of the three is there.
        UserError: a misnamed file, a wrong row, or an empty split.
    """
    bad_files = BadFiles(on_bad_image)
    table = root if root.suffix.lower() == ".csv" else root / TABLE
    if table.is_file():
        parts = _read_csv(table, bad_files)
        return make_dataset("folder", str(table), *parts, bad_files=bad_files)
    if table == root:
        raise MissingDataError("no such file")
    if not _has(root, MARKET_PARTS) and _has(root, PERSON_PARTS):
        base, parts = root, _read_people(root, bad_files)
    else:
        base, parts = read_market_layout(root, (), bad_files)
    return make_dataset("folder", str(base), *parts, bad_files=bad_files)


def _has(root: pathlib.Path, parts: Sequence[str]) -> bool:
    return all((root / part).is_dir() for part in parts)


def _read_csv(table: pathlib.Path, bad_files: BadFiles) -> list[list[Entry]]:
    parts: dict[str, list[Entry]] = {part: [] for part in PERSON_PARTS}
    bad = []
    for row in read_table(table, _COLUMNS):
        fields = row.fields or {}
        pid, camid, sequence = (
            parse_whole(fields.get(column) or default)
            for column, default in (("pid", ""), ("camid", ""), ("sequence", "0"))
        )
        name = fields.get("path", "").replace("\\", "/")  # as Windows writes it
        part = parts.get(fields.get("split", "").lower())
        if part is None or pid is None or pid < JUNK_PID or camid is None or sequence is None:
            bad.append(f"line {row.line} ({row.text})")
        elif not name:
            bad.append(f"line {row.line} (no path)")
        else:
            part.append(Entry(table.parent / name, pid, camid, sequence, name))
    bad_files.report(
        str(table),
        bad,
        "without a path, whole numbers below 2^63 as pid (from -1 on) and camid, and one of train, "
        "query, gallery as split",
        "row",
    )
    return list(parts.values())


def _read_people(base: pathlib.Path, bad_files: BadFiles) -> list[list[Entry]]:
    listed = {part: list_images(base / part, recursive=True) for part in PERSON_PARTS}
    people = {name.split("/")[0] for images, _ in listed.values() for name in images if "/" in name}
    pids = _number_people(base, people)
    parts = []
    for part, (images, bad) in listed.items():
        entries = []
        for name in images:
            person, _, file = name.partition("/")
            match = CAMERA.search(file)
            camid = parse_whole(match[1]) if match else None
            sequence = parse_whole(match[2] or "0") if match else None
            if camid is None or sequence is None:
                bad.append(name)
            else:
                entries.append(Entry(base / part / name, pids[person], camid, sequence, name))
        bad_files.report(
            str(base / part),
            sorted(bad),
            "not like PERSON/c1_0001.jpg, with c and a camera's number",
        )
        parts.append(entries)
    return parts


def _number_people(base: pathlib.Path, people: set[str]) -> dict[str, int]:
    """Number people by their directories' names."""
    numbers = {name: parse_whole(name) for name in people}
    special = (DISTRACTOR_PID, JUNK_PID)
    if any(number is None for number in numbers.values()):
        named = sorted(name for name, number in numbers.items() if number not in special)
        numbers |= {name: i for i, name in enumerate(named, 1)}
    pids = {name: number for name, number in numbers.items() if number is not None}
    below = [name for name, pid in pids.items() if pid < JUNK_PID]
    if below:
        raise UserError(
            f"{base}: the directory {below[0]} is no identity; expected a number from 1 on, 0 for "
            "distractors, -1 for junk, or a name"
        )
    return pids

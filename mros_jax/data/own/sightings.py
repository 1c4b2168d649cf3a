"""What every format is read into: who was seen where, by which camera, on which picture."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence

from mros_jax.data.datasets.layouts import BadFiles
from mros_jax.data.text import parse_number, parse_whole
from mros_jax.errors import UserError

Box = tuple[float, float, float, float]

# Why something was left out -> where it is written: what is no mistake, and yet not taken.
LeftOut = collections.defaultdict[str, list[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Sighting:
    """One person on one picture.

    Attributes:
        identity: name of the person; the same name is the same person.
        camera: name of the camera.
        file: an image or a video.
        frame: number of the picture, from 1: in a video, or else in the order of its camera.
        box: left, top, width and height in pixels of the upright picture, beyond which it may
            reach; None for the whole picture.
        origin: where this is written, for people to find it.
        split: "train", "query" or "gallery" where that is given, or else empty.
    """

    identity: str
    camera: str
    file: pathlib.Path
    frame: int
    box: Box | None
    origin: str
    split: str = ""


def make_box(texts: Sequence[str]) -> Box | None:
    """Make a box of four numbers, or None of anything else or of a box without area."""
    numbers = [number for number in map(parse_number, texts) if number is not None]
    if len(texts) != 4 or len(numbers) != 4 or min(numbers[2:]) <= 0:
        return None
    left, top, width, height = numbers
    return left, top, width, height


def natural_key(name: str) -> tuple[str, str]:
    """Sort key under which "cam 9" comes before "cam 10"; different names have different keys."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name), name


def number_names(names: Iterable[str]) -> dict[str, int]:
    """Number identities or cameras.

    Names that all are different whole numbers from 1 on keep them; others are numbered from 1 in
    their natural order.
    """
    ordered = sorted(set(names), key=natural_key)
    numbers = [parse_whole(name) for name in ordered]
    known = [number for number in numbers if number is not None and number >= 1]
    if len(set(known)) == len(ordered):
        return dict(zip(ordered, known, strict=True))
    return {name: i for i, name in enumerate(ordered, 1)}


def find_camera(name: str, pattern: str) -> str:
    """Find the first group of a regular expression in a name; empty where it does not match.

    Raises:
        UserError: it is no regular expression with a group.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"camera_pattern {pattern!r} is no regular expression: {error}") from error
    if not expression.groups:
        raise UserError(
            f"camera_pattern {pattern!r} has no group; expected one around the camera, such as "
            r"'cam(\d+)'"
        )
    match = expression.search(name)
    return (match[1] or "") if match else ""


def drop_repeated(
    sightings: list[Sighting],
    key: Callable[[Sighting], Hashable],
    bad_files: BadFiles,
    where: str,
    what: str,
) -> list[Sighting]:
    """Keep the first of the sightings with the same key.

    Args:
        sightings: what was read.
        key: what must differ.
        bad_files: what is done about the others.
        where: the file that they are written in.
        what: of what there are several, in words.

    Raises:
        UserError: there are others, and such are not to be skipped.
    """
    first: dict[Hashable, Sighting] = {}
    repeated = []
    for sighting in sightings:
        same = first.setdefault(key(sighting), sighting)
        if same is not sighting:
            repeated.append(f"{sighting.origin} (as {same.origin})")
    bad_files.report(where, repeated, what, "repetition")
    return list(first.values())


def keep_present(sightings: list[Sighting], bad_files: BadFiles) -> list[Sighting]:
    """Keep the sightings whose image or video is there.

    Raises:
        UserError: some are missing, and such are not to be skipped.
    """
    # Unlike pathlib's, this is_file has no errors for names that no file can have.
    files = {sighting.file for sighting in sightings}
    missing = {file for file in files if not os.path.isfile(file)}
    bad_files.report("pictures", sorted(map(str, missing)), "not there")
    return [sighting for sighting in sightings if sighting.file not in missing]

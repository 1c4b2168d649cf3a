"""From files to splits; and the layout of Market-1501, which other data sets share."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from mros_jax.data.images import EncodedImages
from mros_jax.data.listing import list_images
from mros_jax.data.splits import (
    DISTRACTOR_PID,
    JUNK_PID,
    Dataset,
    Skipped,
    Split,
    relabel,
)
from mros_jax.data.text import fits_64_bits, parse_whole
from mros_jax.errors import NotFoundError, UserError

log = logging.getLogger(__name__)

OnBadImage = str  # "error" or "skip"; check_choice refuses anything else
# Before the names of the 500,000 further distractors, of which the gallery has some of its own.
DISTRACTORS_500K = "500k/"
_MARKET_NAME = re.compile(r"(-1|[0-9]+)_c([0-9]+)(?:s([0-9]+))?(?:_.*)?", re.DOTALL)
_SHOWN = 5


class MissingDataError(NotFoundError):
    """A root without what a reader looks for; the message says what is lacking."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image: its file, identity, camera and sequence as distributed, and its unique name."""

    path: pathlib.Path
    pid: int
    camid: int
    sequence: int = 0
    name: str = ""


def check_choice(on_bad_image: OnBadImage) -> None:
    """Check that it is "error" or "skip".

    Raises:
        UserError: it is neither.
    """
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")


class BadFiles:
    """What is done about files that cannot be used: refused, or left out and remembered.

    Attributes:
        skipped: what was left out so far.
    """

    def __init__(self, on_bad_image: OnBadImage):
        check_choice(on_bad_image)
        self.on_bad_image = on_bad_image
        self.skipped: list[Skipped] = []

    def report(self, where: str, bad: Sequence[str], reason: str, thing: str = "file") -> None:
        """Refuse or note them, if there are any.

        Args:
            where: directory, list or split that they are in.
            bad: their names.
            reason: what is wrong with all of them.
            thing: what each of them is.

        Raises:
            UserError: there are some and they are not to be skipped; it names them.
        """
        if not bad:
            return
        shown = ", ".join(bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        text = f"{where}: {len(bad)} {thing}{'s' if len(bad) > 1 else ''} {reason}"
        if self.on_bad_image == "error":
            raise UserError(
                f"{text}: {shown}{more}. Repair or remove them, or skip them with "
                "on_bad_image='skip'"
            )
        log.warning("%s: %s%s. Skipped", text, shown, more)
        self.skipped.append(Skipped(text, tuple(bad)))


def parse_market_name(stem: str) -> tuple[int, int, int] | None:
    """Parse 0002_c1s1_000451_03 into (pid, camid, sequence), or None if it is no such name."""
    match = _MARKET_NAME.fullmatch(stem)
    if match is None:
        return None
    pid, camid, sequence = (parse_whole(digits or "0") for digits in match.groups())
    if pid is None or camid is None or sequence is None:  # more than 64 bits
        return None
    return pid, camid, sequence


def scan(directory: pathlib.Path, bad_files: BadFiles) -> list[Entry]:
    """Read all image names of a directory in Market-1501 naming.

    Raises:
        UserError: a name that cannot be read, unless such files are skipped.
    """
    images, bad = list_images(directory)
    entries = []
    for name in images:
        parsed = parse_market_name(pathlib.PurePath(name).stem)
        if parsed is None:
            bad.append(name)
        else:
            entries.append(Entry(directory / name, *parsed, name=name))
    bad_files.report(
        str(directory), sorted(bad), "not named like 0002_c1s1_000451_03.jpg (numbers below 2^63)"
    )
    return entries


def make_split(name: str, entries: Iterable[Entry], where: str) -> Split:
    """Build a split from its entries.

    Raises:
        UserError: there are none, a name occurs twice, or a number has no place among identities
            or in 64 bits.
    """
    rows = list(entries)
    if not rows:
        raise UserError(f"the {name} split is empty: no images found in {where}")
    for row in rows:
        if row.pid < JUNK_PID or not all(map(fits_64_bits, (row.pid, row.camid, row.sequence))):
            raise UserError(
                f"{where}: {row.name} has pid {row.pid}, camera {row.camid}, sequence "
                f"{row.sequence}; expected whole numbers below 2^63, and a pid from 1 on (0 for "
                "distractors, -1 for junk)"
            )
    names = np.array([row.name for row in rows])
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        raise UserError(f"the {name} split has several images named {unique[counts > 1][0]!r}")
    paths = [row.path for row in rows]
    pids = np.array([row.pid for row in rows], np.int64)
    return Split(
        name=name,
        names=names,
        pids=pids,
        camids=np.array([row.camid for row in rows], np.int64),
        sequences=np.array([row.sequence for row in rows], np.int64),
        images=EncodedImages(lambda row: paths[row].read_bytes(), len(paths)),
        labels=relabel(pids)[0] if name == "train" else None,
    )


def make_dataset(
    name: str,
    where: str,
    train: Sequence[Entry],
    query: Sequence[Entry],
    gallery: Sequence[Entry],
    *,
    bad_files: BadFiles,
) -> Dataset:
    """Build a data set from the entries of its splits.

    Junk and distractors have no identity to learn: they are left out of the training split.

    Args:
        name: of the data set.
        where: the directory or file it comes from, for errors.
        train: entries to train on.
        query: queries.
        gallery: gallery.
        bad_files: what was met while reading.

    Raises:
        UserError: a split is empty, or as `make_split`.
    """
    without_identity = (DISTRACTOR_PID, JUNK_PID)
    people = [row for row in train if row.pid not in without_identity]
    others = tuple(row.name for row in train if row.pid in without_identity)
    skipped = list(bad_files.skipped)
    if others:
        message = f"{where}: {len(others)} training images are junk or distractors (pid -1 or 0)"
        log.warning("%s and are left out", message)
        skipped.append(Skipped(message, others, harmless=True))
    learned = make_split("train", people, where)
    return Dataset(
        name=name,
        train=learned,
        query=make_split("query", query, where),
        gallery=make_split("gallery", gallery, where),
        pid_of_label=relabel(learned.pids)[1],
        skipped=tuple(skipped),
    )


def find_root(root: pathlib.Path, needed: Sequence[str], inner: Sequence[str] = ()) -> pathlib.Path:
    """Find the root, or the directory of the unpacked archive in it, that has all of `needed`.

    Raises:
        MissingDataError: neither has.
        PermissionError: the root may not be read.
    """
    if not root.is_dir():
        raise MissingDataError("it is a file" if root.is_file() else "no such directory")
    present = {path.name for path in root.iterdir()}  # a directory that may not be read says so
    for candidate in (root, *(root / entry for entry in inner if entry in present)):
        if all((candidate / entry).exists() for entry in needed):
            return candidate
    lacking = [entry for entry in needed if entry not in present]
    raise MissingDataError(f"without {', '.join(lacking)}")


MARKET_PARTS = ("bounding_box_train", "query", "bounding_box_test")


def read_market_layout(
    root: pathlib.Path, inner: Sequence[str], bad_files: BadFiles
) -> tuple[pathlib.Path, list[list[Entry]]]:
    """Read a directory in Market-1501's layout.

    Returns:
        The directory found, and the entries of training, query and gallery.
    """
    base = find_root(root, MARKET_PARTS, inner)
    return base, [scan(base / part, bad_files) for part in MARKET_PARTS]


def read_market1501(
    root: pathlib.Path, *, distractors_500k: bool = False, on_bad_image: OnBadImage = "error"
) -> Dataset:
    """Read Market-1501 (Zheng et al., ICCV 2015) as distributed.

    Args:
        root: `Market-1501-v15.09.15`, or the directory that holds it.
        distractors_500k: add the 500,000 further distractors to the gallery, from
            `distractors_500k/` or `images/` (as the archive unpacks) in either. All of them get pid
            0; the camera is that of the name, or 0 where it has none.
        on_bad_image: what to do about files whose names cannot be read: "error" or "skip".

    Raises:
        MissingDataError: the directories are not there.
        UserError: a misnamed file, or an empty split.
    """
    bad_files = BadFiles(on_bad_image)
    base, parts = read_market_layout(root, ("Market-1501-v15.09.15", "market1501"), bad_files)
    if distractors_500k:
        parts[2] = parts[2] + _read_distractors((base, root), bad_files)
    return make_dataset("market1501", str(base), *parts, bad_files=bad_files)


def _read_distractors(bases: Sequence[pathlib.Path], bad_files: BadFiles) -> list[Entry]:
    found = [
        base / entry
        for base in bases
        for entry in ("distractors_500k", "images")
        if (base / entry).is_dir()
    ]
    if not found:
        raise MissingDataError(
            "with distractors_500k, but without distractors_500k/ or images/ of "
            "distractors_500k.zip"
        )
    images, others = list_images(found[0])
    bad_files.report(str(found[0]), others, "not images")
    entries = []
    for name in images:
        _, camid, sequence = parse_market_name(pathlib.PurePath(name).stem) or (0, 0, 0)
        entries.append(
            Entry(found[0] / name, DISTRACTOR_PID, camid, sequence, DISTRACTORS_500K + name)
        )
    return entries


def read_dukemtmc(root: pathlib.Path, *, on_bad_image: OnBadImage = "error") -> Dataset:
    """Read DukeMTMC-reID (Zheng et al., ICCV 2017) as it was distributed.

    Args:
        root: `DukeMTMC-reID`, or the directory that holds it.
        on_bad_image: what to do about files whose names cannot be read: "error" or "skip".

    Raises:
        MissingDataError: the directories are not there.
        UserError: a misnamed file, or an empty split.
    """
    bad_files = BadFiles(on_bad_image)
    inner = ("DukeMTMC-reID", "dukemtmc-reid", "dukemtmc")
    base, parts = read_market_layout(root, inner, bad_files)
    return make_dataset("dukemtmc", str(base), *parts, bad_files=bad_files)

"""Readers of directory layouts: Market-1501, DukeMTMC-reID and everything named like them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from mros_jax.data.splits import Dataset, Split, relabel

OnBadImage = Literal["error", "skip"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# What operating systems leave behind, and what the archives themselves contain beside images.
_CLUTTER = ("thumbs.db", "desktop.ini", "readme.txt", "readme.md")
_MARKET_NAME = re.compile(r"^(-1|\d+)_c(\d+)(?:s(\d+))?(?:_.*)?$")


@dataclasses.dataclass(frozen=True)
class Record:
    """One image: its file, identity, camera and sequence as distributed, and its unique name."""

    path: pathlib.Path
    pid: int
    camid: int
    sequence: int = 0
    name: str = ""


# name: (where the data can be asked for, the layout expected below the root)
WHERE: dict[str, tuple[str, str]] = {
    "market1501": (
        "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html (Market-1501-v15.09.15.zip)",
        "bounding_box_train/, query/ and bounding_box_test/ with files like 0002_c1s1_000451_03.jpg",
    ),
    "folder": (
        "it is your own directory",
        "bounding_box_train/, query/ and bounding_box_test/ with files like 0002_c1s1_000451_03.jpg, "
        "or a file images.csv with the header path,pid,camid,split",
    ),
}


def missing(name: str, root: pathlib.Path | None, what: str = "") -> str:
    """Returns the message for data that are not there: what is expected, where to ask, what to do now."""
    source, layout = WHERE[name]
    seen = "no root was given" if root is None else f"nothing usable at {root}"
    return (
        f"data set {name!r}: {seen}{what and ' (' + what + ')'}.\n"
        f"  expected: {layout}\n"
        f"  available from: {source}\n"
        "  then: --config.dataset.root=PATH; or use the embedded data set now, which needs no files: "
        "--config configs/mros.py:synthetic"
    )


def parse_market_name(stem: str) -> tuple[int, int, int] | None:
    """Returns (pid, camid, sequence) of a name like 0002_c1s1_000451_03, or None if it is not one."""
    match = _MARKET_NAME.match(stem)
    if match is None:
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0)


def list_images(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns the images of a directory in order of name, and what else is there but clutter."""
    images, others = [], []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _CLUTTER:
            continue
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        (images if is_image else others).append(path)
    return images, others


def report_bad(directory: str, bad: list[str], reason: str, on_bad_image: OnBadImage) -> None:
    """Raises or warns, naming the files, if there are any bad ones.

    Raises:
      ValueError: there are some and `on_bad_image` is "error"; or it is neither "error" nor "skip".
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")
    if not bad:
        return
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    text = f"{directory}: {len(bad)} {'file' if len(bad) == 1 else 'files'} {reason}: {shown}"
    if on_bad_image == "error":
        raise ValueError(f"{text}. Repair or remove them, or skip them with on_bad_image='skip'")
    warnings.warn(f"{text}. Skipped", stacklevel=3)


def scan(
    directory: pathlib.Path,
    on_bad_image: OnBadImage,
    parse: Callable[[str], tuple[int, int, int] | None] = parse_market_name,
) -> list[Record]:
    """Reads all image names of a directory."""
    images, others = list_images(directory)
    records, bad = [], [path.name for path in others]
    for path in images:
        parsed = parse(path.stem)
        if parsed is None:
            bad.append(path.name)
        else:
            records.append(Record(path, *parsed, name=path.name))
    report_bad(str(directory), bad, "not named like 0002_c1s1_000451_03.jpg", on_bad_image)
    return records


def make_split(name: str, records: Iterable[Record], where: str) -> Split:
    """Builds a split from its records.

    Raises:
      ValueError: there are none, or a name occurs twice.
    """
    rows = list(records)
    if not rows:
        raise ValueError(f"the {name} split is empty: no images found in {where}")
    names = np.array([row.name for row in rows])
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        raise ValueError(f"the {name} split has several images named {unique[counts > 1][0]!r}")
    paths = [row.path for row in rows]
    pids = np.array([row.pid for row in rows], np.int32)
    return Split(
        name=name,
        names=names,
        pids=pids,
        camids=np.array([row.camid for row in rows], np.int32),
        sequences=np.array([row.sequence for row in rows], np.int32),
        labels=relabel(pids)[0] if name == "train" else None,
        reader=lambda i: paths[i].read_bytes(),
    )


def make_dataset(
    name: str, root: pathlib.Path, train: list[Record], query: list[Record], gallery: list[Record]
) -> Dataset:
    """Builds a data set from the records of its splits; junk and distractors do not train."""
    train = [row for row in train if row.pid > 0]
    splits = [
        make_split(split, records, str(root))
        for split, records in (("train", train), ("query", query), ("gallery", gallery))
    ]
    return Dataset(name, *splits, pid_of_label=relabel(splits[0].pids)[1])


def find_root(
    name: str, root: pathlib.Path, needed: tuple[str, ...], inner: tuple[str, ...]
) -> pathlib.Path:
    """Returns root, or the directory of the unpacked archive in it, that holds all of `needed`.

    Raises:
      FileNotFoundError: neither does.
    """
    for candidate in (root, *(root / name for name in inner)):
        if all((candidate / entry).exists() for entry in needed):
            return candidate
    lacking = [entry for entry in needed if not (root / entry).exists()]
    what = "no such directory" if not root.is_dir() else f"{', '.join(lacking)} missing"
    raise FileNotFoundError(missing(name, root, what))


_MARKET_PARTS = ("bounding_box_train", "query", "bounding_box_test")


def read_market1501(
    root: pathlib.Path, *, distractors_500k: bool = False, on_bad_image: OnBadImage = "error"
) -> Dataset:
    """Reads Market-1501 (Zheng et al., ICCV 2015) as distributed.

    Args:
      root: `Market-1501-v15.09.15`, or the directory that holds it.
      distractors_500k: add the 500,000 further distractors to the gallery, from `distractors_500k/`
        (or `images/`) in the root; they get pid 0.
      on_bad_image: what to do about files whose names cannot be read: "error" or "skip".

    Raises:
      FileNotFoundError: the directories are not there.
      ValueError: a misnamed file, or an empty split.
    """
    base = find_root("market1501", root, _MARKET_PARTS, ("Market-1501-v15.09.15", "market1501"))
    train, query, gallery = (scan(base / part, on_bad_image) for part in _MARKET_PARTS)
    return make_dataset("market1501", base, train, query, gallery)


def read_folder(root: pathlib.Path, *, on_bad_image: OnBadImage = "error") -> Dataset:
    """Reads one's own images in Market-1501 naming, or as a CSV says."""
    base = find_root("folder", root, _MARKET_PARTS, ())
    train, query, gallery = (scan(base / part, on_bad_image) for part in _MARKET_PARTS)
    return make_dataset("folder", base, train, query, gallery)

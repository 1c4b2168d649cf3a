"""Readers of directory layouts: Market-1501, DukeMTMC-reID and everything named like them."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from mros_jax.data.datasets.splits import DISTRACTOR_PID, Dataset, Split, relabel

OnBadImage = str  # "error" or "skip"; check_choice refuses anything else

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


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a data set can be asked for, and what is expected below its root."""

    source: str
    layout: str


_MARKET_LAYOUT = "bounding_box_train/, query/ and bounding_box_test/ with files like "
_MSMT17_LISTS = "list_train.txt, list_val.txt, list_query.txt, list_gallery.txt"
_CUHK03_SITE = (
    "http://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html (cuhk03_release.zip), "
    "https://github.com/zhunzhong07/person-re-ranking (cuhk03_new_protocol_config_*.mat, CUHK03-NP)"
)


def _cuhk03_layout(kind: str) -> str:
    return (
        f"{kind}/bounding_box_train/, {kind}/query/, {kind}/bounding_box_test/ (CUHK03-NP); or "
        f"cuhk03_new_protocol_config_{kind}.mat beside cuhk-03.mat or images_{kind}/"
    )


ORIGINS: dict[str, Origin] = {
    "market1501": Origin(
        "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html (Market-1501-v15.09.15.zip)",
        _MARKET_LAYOUT + "0002_c1s1_000451_03.jpg",
    ),
    "dukemtmc": Origin(
        "nowhere officially: its authors withdrew it in 2019; for those who have a copy",
        _MARKET_LAYOUT + "0001_c2_f0046182.jpg",
    ),
    "msmt17": Origin(
        "https://www.pkuvmc.com/dataset.html (on request)", f"train/, test/ and {_MSMT17_LISTS}"
    ),
    "msmt17_v2": Origin(
        "https://www.pkuvmc.com/dataset.html (on request)",
        f"mask_train_v2/, mask_test_v2/ and {_MSMT17_LISTS}",
    ),
    "cuhk03_labeled": Origin(_CUHK03_SITE, _cuhk03_layout("labeled")),
    "cuhk03_detected": Origin(_CUHK03_SITE, _cuhk03_layout("detected")),
    "cuhk03_labeled_classic": Origin(_CUHK03_SITE, "cuhk-03.mat"),
    "cuhk03_detected_classic": Origin(_CUHK03_SITE, "cuhk-03.mat"),
    "folder": Origin(
        "you: it is your own directory",
        _MARKET_LAYOUT + "0002_c1s1_000451_03.jpg, or images.csv with the columns "
        "path,pid,camid,split",
    ),
}


def missing(name: str, root: pathlib.Path | None, what: str = "") -> str:
    """Returns the message for data that are not there: what is expected, where to ask, what now."""
    origin = ORIGINS[name]
    seen = "no root was given" if root is None else f"nothing usable at {root}"
    return (
        f"data set {name!r}: {seen}{what and ' (' + what + ')'}.\n"
        f"  expected there: {origin.layout}\n"
        f"  available from: {origin.source}\n"
        "  then: --config.dataset.root=PATH\n"
        "  or use the embedded data set now, which needs no files: "
        "--config configs/mros.py:synthetic"
    )


def parse_market_name(stem: str) -> tuple[int, int, int] | None:
    """Returns (pid, camid, sequence) of 0002_c1s1_000451_03, or None if it is no such name."""
    match = _MARKET_NAME.match(stem)
    if match is None:
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0)


def list_images(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns the images of a directory in order of name, and what else is there but clutter."""
    images: list[pathlib.Path] = []
    others: list[pathlib.Path] = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _CLUTTER:
            continue
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        (images if is_image else others).append(path)
    return images, others


def check_choice(on_bad_image: OnBadImage) -> None:
    """Raises ValueError unless it is "error" or "skip"."""
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")


def report_bad(
    where: str, bad: list[str], reason: str, on_bad_image: OnBadImage, thing: str = "file"
) -> None:
    """Raises or warns, naming the files, if there are any bad ones.

    Raises:
      ValueError: there are some and `on_bad_image` is "error"; or it is neither "error" nor "skip".
    """
    check_choice(on_bad_image)
    if not bad:
        return
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    text = f"{where}: {len(bad)} {thing}{'s' if len(bad) > 1 else ''} {reason}: {shown}"
    if on_bad_image == "error":
        raise ValueError(f"{text}. Repair or remove them, or skip them with on_bad_image='skip'")
    warnings.warn(f"{text}. Skipped", stacklevel=3)


def scan(directory: pathlib.Path, on_bad_image: OnBadImage) -> list[Record]:
    """Reads all image names of a directory in Market-1501 naming.

    Raises:
      ValueError: a name that cannot be read (`on_bad_image="error"`).
    """
    images, others = list_images(directory)
    records, bad = [], [path.name for path in others]
    for path in images:
        parsed = parse_market_name(path.stem)
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
    name: str,
    where: str,
    train: list[Record],
    query: list[Record],
    gallery: list[Record],
) -> Dataset:
    """Builds a data set from the records of its splits.

    Junk and distractors have no identity to learn: they are left out of the training split, with a
    warning that counts them.

    Raises:
      ValueError: a split is empty, or a name occurs twice in it.
    """
    people = [row for row in train if row.pid > DISTRACTOR_PID]
    if len(people) < len(train):
        warnings.warn(
            f"{where}: {len(train) - len(people)} training images are junk or distractors "
            "(pid -1 or 0) and are left out",
            stacklevel=2,
        )
    learned = make_split("train", people, where)
    return Dataset(
        name=name,
        train=learned,
        query=make_split("query", query, where),
        gallery=make_split("gallery", gallery, where),
        pid_of_label=relabel(learned.pids)[1],
    )


def find_root(
    name: str, root: pathlib.Path, needed: Sequence[str], inner: Sequence[str] = ()
) -> pathlib.Path:
    """Returns the root, or the directory of the unpacked archive in it, that has all of `needed`.

    Raises:
      FileNotFoundError: neither has.
    """
    for candidate in (root, *(root / entry for entry in inner)):
        if all((candidate / entry).exists() for entry in needed):
            return candidate
    lacking = [entry for entry in needed if not (root / entry).exists()]
    what = "no such directory" if not root.is_dir() else f"without {', '.join(lacking)}"
    raise FileNotFoundError(missing(name, root, what))


MARKET_PARTS = ("bounding_box_train", "query", "bounding_box_test")


def read_market_layout(
    name: str, root: pathlib.Path, inner: Sequence[str], on_bad_image: OnBadImage
) -> tuple[pathlib.Path, list[list[Record]]]:
    """Returns the directory found and the records of training, query and gallery."""
    base = find_root(name, root, MARKET_PARTS, inner)
    return base, [scan(base / part, on_bad_image) for part in MARKET_PARTS]


def read_market1501(
    root: pathlib.Path, *, distractors_500k: bool = False, on_bad_image: OnBadImage = "error"
) -> Dataset:
    """Reads Market-1501 (Zheng et al., ICCV 2015) as distributed.

    Args:
      root: `Market-1501-v15.09.15`, or the directory that holds it.
      distractors_500k: add the 500,000 further distractors to the gallery, from `distractors_500k/`
        or `images/` (as the archive unpacks) in either. All of them get pid 0; the camera is that
        of the name, or 0 where it tells none.
      on_bad_image: what to do about files whose names cannot be read: "error" or "skip".

    Raises:
      FileNotFoundError: the directories are not there.
      ValueError: a misnamed file, or an empty split.
    """
    base, parts = read_market_layout(
        "market1501", root, ("Market-1501-v15.09.15", "market1501"), on_bad_image
    )
    if distractors_500k:
        parts[2] = parts[2] + _read_distractors((base, root), on_bad_image)
    return make_dataset("market1501", str(base), *parts)


def _read_distractors(bases: Sequence[pathlib.Path], on_bad_image: OnBadImage) -> list[Record]:
    found = [
        base / entry
        for base in bases
        for entry in ("distractors_500k", "images")
        if (base / entry).is_dir()
    ]
    if not found:
        raise FileNotFoundError(
            f"distractors_500k is asked for, but {bases[0]} has neither distractors_500k/ nor "
            f"images/; available from: {ORIGINS['market1501'].source} (distractors_500k.zip)"
        )
    images, others = list_images(found[0])
    report_bad(str(found[0]), [path.name for path in others], "not images", on_bad_image)
    records = []
    for path in images:
        _, camid, sequence = parse_market_name(path.stem) or (0, 0, 0)
        # The prefix keeps names unique: the gallery has distractors of its own.
        records.append(Record(path, DISTRACTOR_PID, camid, sequence, f"500k/{path.name}"))
    return records


def read_dukemtmc(root: pathlib.Path, *, on_bad_image: OnBadImage = "error") -> Dataset:
    """Reads DukeMTMC-reID (Zheng et al., ICCV 2017) as it was distributed.

    Args:
      root: `DukeMTMC-reID`, or the directory that holds it.
      on_bad_image: what to do about files whose names cannot be read: "error" or "skip".

    Raises:
      FileNotFoundError: the directories are not there.
      ValueError: a misnamed file, or an empty split.
    """
    inner = ("DukeMTMC-reID", "dukemtmc-reid", "dukemtmc")
    base, parts = read_market_layout("dukemtmc", root, inner, on_bad_image)
    return make_dataset("dukemtmc", str(base), *parts)


def read_folder(root: pathlib.Path, *, on_bad_image: OnBadImage = "error") -> Dataset:
    """Reads one's own images: in Market-1501 naming, or as a CSV file says.

    The CSV has a header with the columns path (relative to the CSV), pid, camid, split ("train",
    "query" or "gallery") and, if wanted, sequence. Pids are whole numbers: people from 1 on, 0 for
    distractors, -1 for junk.

    Args:
      root: a directory in Market-1501's layout, one with `images.csv`, or a CSV file.
      on_bad_image: what to do about names and rows that cannot be read: "error" or "skip".

    Raises:
      FileNotFoundError: neither is there.
      ValueError: a misnamed file, a wrong row, or an empty split.
    """
    table = root if root.suffix == ".csv" else root / "images.csv"
    if table.is_file():
        return make_dataset("folder", str(table), *_read_csv(table, on_bad_image))
    base, parts = read_market_layout("folder", root, (), on_bad_image)
    return make_dataset("folder", str(base), *parts)


def _read_csv(table: pathlib.Path, on_bad_image: OnBadImage) -> list[list[Record]]:
    parts: dict[str, list[Record]] = {"train": [], "query": [], "gallery": []}
    bad = []
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, restval="")
        lacking = {"path", "pid", "camid", "split"} - set(rows.fieldnames or ())
        if lacking:
            raise ValueError(
                f"{table}: the header must be path,pid,camid,split; "
                f"{', '.join(sorted(lacking))} missing in {rows.fieldnames}"
            )
        for row in rows:
            try:
                record = Record(
                    path=table.parent / row["path"],
                    pid=int(row["pid"]),
                    camid=int(row["camid"]),
                    sequence=int(row.get("sequence") or 0),
                    name=row["path"],
                )
                parts[row["split"]].append(record)
            except (ValueError, KeyError):
                bad.append(f"line {rows.line_num} ({','.join(map(str, row.values()))})")
    report_bad(
        str(table),
        bad,
        "without whole numbers as pid and camid and one of train, query, gallery as split",
        on_bad_image,
        "row",
    )
    return list(parts.values())

"""From what people have to a data set that every program reads: Market-1501's directories."""

from __future__ import annotations

import collections
import csv
import dataclasses
import inspect
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mros_jax import files
from mros_jax.data.datasets.layouts import MARKET_PARTS, BadFiles
from mros_jax.data.own.coco import read_coco
from mros_jax.data.own.drawing import cut_tracks, draw_splits
from mros_jax.data.own.mot import read_mot
from mros_jax.data.own.pictures import write_pictures
from mros_jax.data.own.sightings import LeftOut, Sighting, natural_key, number_names
from mros_jax.data.own.tables import read_csv, read_people
from mros_jax.errors import UserError

# The one list of formats: name -> reader. A reader's keyword arguments are the format's options.
FORMATS: dict[str, Callable[..., list[Sighting]]] = {
    "mot": read_mot,
    "coco": read_coco,
    "csv": read_csv,
    "people": read_people,
}
_DIRECTORY = dict(zip(("train", "query", "gallery"), MARKET_PARTS, strict=True))
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What was prepared.

    Attributes:
        path: the directory, in Market-1501's layout.
        notes: what was found, left out and decided, a line each.
    """

    path: pathlib.Path
    notes: tuple[str, ...]


def options_of(name: str) -> list[str]:
    """Return the names of a format's own options.

    Raises:
        UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")
    return [
        parameter.name
        for parameter in inspect.signature(FORMATS[name]).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]


def prepare_own(
    name: str,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    on_bad_image: str = "error",
    pseudo_cameras: int = 0,
    test_fraction: float = 0.5,
    min_images: int = 2,
    seed: int = 0,
    min_height: int = 32,
    min_width: int = 16,
    image_format: str = "jpeg",
    progress: bool = True,
    **options: Any,
) -> Preparation:
    """Make a data set of one's own people, in Market-1501's layout.

    Beside the three directories of images there are `identities.csv` (pid, identity),
    `cameras.csv` (camid, camera), `sources.csv`, which says of every image where it comes from, and
    `prepared.json` with the options. The directory takes its name when all is in it.

    Args:
        name: of the format, see `FORMATS`.
        root: file or directory to read.
        out: directory to write, which is empty or not there.
        on_bad_image: what to do about lines, rows and images that cannot be read: "error", or
            "skip" to leave them out.
        pseudo_cameras: cut what a camera saw of an identity into so many parts that count as
            cameras, see `drawing.cut_tracks`; 0 does not.
        test_fraction: see `drawing.draw_splits`.
        min_images: see `drawing.draw_splits`.
        seed: see `drawing.draw_splits`.
        min_height: in pixels, of what a frame has of a box; smaller ones are left out.
        min_width: the same.
        image_format: "jpeg" (quality 95) or "png", of what is cut out.
        progress: show a progress bar.
        **options: the format's own, see its reader.

    Raises:
        UserError: an option that the format does not have or a value that it cannot have; what the
            reader cannot read; too few identities or cameras; `out` is in use.
        NotFoundError: there is nothing at `root`.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            others = [other for other in FORMATS if option in options_of(other)]
            raise UserError(
                f"format {name!r} has no option {option}"
                + (f"; it is of {', '.join(others)}" if others else "")
            )
    _check("pseudo_cameras", pseudo_cameras, pseudo_cameras == 0 or pseudo_cameras > 1, "2 or more")
    _check("test_fraction", test_fraction, 0 < test_fraction < 1, "a number between 0 and 1")
    _check("image_format", image_format, image_format in ("jpeg", "png"), "jpeg or png")
    _check("seed", seed, seed >= 0, "0 or more")
    every = options.get("every", 1)
    _check("every", every, every >= 1, "1 or more")
    out = pathlib.Path(out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; remove it, or prepare into another directory")
    bad_files, left_out = BadFiles(on_bad_image), LeftOut(list)

    def arrange(sightings: Sequence[Sighting]) -> tuple[list[Sighting], list[str]]:
        arranged = cut_tracks(sightings, pseudo_cameras) if pseudo_cameras else list(sightings)
        try:
            return arranged, draw_splits(
                arranged, test_fraction=test_fraction, min_images=min_images, seed=seed
            )
        except UserError as error:
            lines = (f"{root}: {error}", *_list_reasons(left_out))
            raise UserError("\n  ".join(lines)) from error

    sightings = FORMATS[name](pathlib.Path(root).expanduser(), bad_files, left_out, **options)
    arrange(sightings)  # what cannot be split need not be cut out
    with files.make_directory_atomically(out) as directory:
        loose = directory / "loose"
        loose.mkdir()
        pictures = write_pictures(
            sightings,
            loose,
            bad_files,
            left_out,
            image_format=image_format,
            min_size=(min_height, min_width),
            progress=progress,
        )
        sightings, splits = arrange([sighting for sighting, _ in pictures])
        _place(directory, sightings, splits, [path for _, path in pictures])
        shutil.rmtree(loose)
        description = {
            "format": name,
            "root": os.fspath(root),
            "on_bad_image": on_bad_image,
            "pseudo_cameras": pseudo_cameras,
            "test_fraction": test_fraction,
            "min_images": min_images,
            "seed": seed,
            "min_height": min_height,
            "min_width": min_width,
            "image_format": image_format,
            **options,
        }
        files.write_json(directory / "prepared.json", description)
    few = {seen.identity for seen, split in zip(sightings, splits, strict=True) if not split}
    left_out[f"identities of fewer than {min_images} images"] += sorted(few, key=natural_key)
    notes = [
        *_describe(sightings, splits, pseudo_cameras),
        *(f"skipped: {skipped.message}" for skipped in bad_files.skipped),
        *_list_reasons(left_out),
    ]
    return Preparation(out, tuple(notes))


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise UserError(f"{name} is {value!r}; expected {expected}")


def _place(
    directory: pathlib.Path,
    sightings: Sequence[Sighting],
    splits: Sequence[str],
    pictures: Sequence[pathlib.Path],
) -> None:
    """Move pictures to where their split is, by names of Market-1501's, and write who is who."""
    used = [row for row, split in enumerate(splits) if split]
    pids = number_names(sightings[row].identity for row in used)
    camids = number_names(sightings[row].camera for row in used)
    for part in MARKET_PARTS:
        (directory / part).mkdir()
    sources: list[tuple[Any, ...]] = []
    for row in used:
        seen = sightings[row]
        pid, camid = pids[seen.identity], camids[seen.camera]
        name = f"{pid:04d}_c{camid}s1_{seen.frame:06d}_{row:02d}{pictures[row].suffix}"
        place = f"{_DIRECTORY[splits[row]]}/{name}"
        pictures[row].rename(directory / place)
        box = seen.box or ("",) * 4
        where = (seen.file, seen.frame, *box, seen.origin)
        sources.append((place, seen.identity, seen.camera, *where))
    header = "image,identity,camera,file,frame,left,top,width,height,origin"
    _write_csv(directory / "sources.csv", header, sources)
    for file, header, numbers in (
        ("identities.csv", "pid,identity", pids),
        ("cameras.csv", "camid,camera", camids),
    ):
        _write_csv(directory / file, header, ((number, name) for name, number in numbers.items()))


def _write_csv(path: pathlib.Path, header: str, rows: Iterable[Sequence[Any]]) -> None:
    # What is no character, as in names of files in another encoding, is written as \xE4.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def _describe(sightings: Sequence[Sighting], splits: Sequence[str], pseudo: int) -> list[str]:
    """Tell in plain words what was made of what."""
    kept = [(s, split) for s, split in zip(sightings, splits, strict=True) if split]
    cameras_of: dict[str, set[str]] = collections.defaultdict(set)
    people: dict[str, set[str]] = collections.defaultdict(set)
    for sighting, split in kept:
        cameras_of[sighting.identity].add(sighting.camera)
        people[split].add(sighting.identity)
    cameras = {sighting.camera for sighting, _ in kept}
    count = collections.Counter(split for _, split in kept)
    tested = people["query"] | people["gallery"]
    notes = [
        f"{len(kept):,} images of {len(cameras_of):,} identities and {len(cameras):,} cameras",
        f"to train: {count['train']:,} images of {len(people['train']):,} identities",
        f"to test: {count['query']:,} queries and {count['gallery']:,} images of a gallery, of "
        f"{len(tested):,} identities",
    ]
    single = sorted((name for name, of in cameras_of.items() if len(of) == 1), key=natural_key)
    if single:
        what = "cannot be searched for in another camera"
        what += "; those whose split is drawn train" if set(single) & people["train"] else ""
        notes.append(f"{len(single):,} identities of one camera {what}: {_show(single)}")
    if pseudo:
        notes.append(
            f"pseudo-cameras: what a camera saw of an identity was cut in time into {pseudo} parts "
            "that count as cameras, so that scores say how people are found again in the same "
            "view; they must not be compared with scores of real cameras"
        )
    return notes


def _list_reasons(left_out: LeftOut) -> list[str]:
    return [
        f"left out: {len(origins):,} {reason}: {_show(origins)}"
        for reason, origins in sorted(left_out.items())
        if origins
    ]


def _show(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more

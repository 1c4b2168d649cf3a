"""Readers of a table, and of a directory for each identity."""

from __future__ import annotations

import pathlib
from collections.abc import Hashable, Mapping

from mros_jax.data.datasets.folder import CAMERA, PERSON_PARTS
from mros_jax.data.datasets.layouts import BadFiles
from mros_jax.data.listing import list_images
from mros_jax.data.own.pictures import is_video
from mros_jax.data.own.sightings import (
    Box,
    LeftOut,
    Sighting,
    drop_repeated,
    find_camera,
    keep_present,
    make_box,
    natural_key,
)
from mros_jax.data.text import parse_whole, read_table

_COLUMNS = ("path", "identity", "camera")
_BOX = ("left", "top", "width", "height")


def read_csv(
    root: pathlib.Path, bad_files: BadFiles, left_out: LeftOut, *, images: str = ""
) -> list[Sighting]:
    """Read a table with the columns path, identity and camera; names may be any text.

    Columns left, top, width and height are a box to cut out, where they are not empty. A column
    frame is the number of a frame of a video, from 1, which a path that is a video needs; of images
    it states their order in time, which otherwise is that of the rows. A column split (train, query
    or gallery) states the split, which otherwise is drawn.

    Args:
        root: the CSV file; its encoding and marks as for `mros_jax.data.text.read_table`.
        bad_files: what is done about wrong and repeated rows and missing images.
        left_out: gets nothing; what is not wanted can be left out of a table.
        images: directory that paths are relative to; by default that of the table.

    Raises:
        NotFoundError: there is no such file.
        UserError: no such table; a wrong row or a missing image, unless skipped.
    """
    base = pathlib.Path(images).expanduser() if images else root.parent
    sightings: list[Sighting] = []
    bad = []
    for row in read_table(root, _COLUMNS):
        fields = row.fields or {}
        identity, camera = fields.get("identity", ""), fields.get("camera", "")
        name = fields.get("path", "").replace("\\", "/")
        split = fields.get("split", "").lower()
        file, origin = base / name, f"{root}, line {row.line}"
        order = "" if is_video(file) else str(len(sightings) + 1)
        frame = parse_whole(fields.get("frame") or order) or 0
        is_box, box = _parse_box(fields)
        named = bool(name and identity and camera)
        if named and frame >= 1 and is_box and split in ("", *PERSON_PARTS):
            sightings.append(Sighting(identity, camera, file, frame, box, origin, split))
        else:
            bad.append(f"line {row.line} ({row.text})")
    bad_files.report(
        str(root),
        bad,
        "without path, identity or camera, with a box that is not four numbers (left, top, width "
        "and height, which are above 0), a frame that is no number from 1 on (a video needs one), "
        "or a split that is not train, query or gallery",
        "row",
    )

    def place(sighting: Sighting) -> Hashable:
        return sighting.file, sighting.frame if is_video(sighting.file) else 0, sighting.box

    what = "of an image and a box"
    return keep_present(drop_repeated(sightings, place, bad_files, str(root), what), bad_files)


def _parse_box(fields: Mapping[str, str]) -> tuple[bool, Box | None]:
    """Parse the box of a row; also return whether it has a right one, or none at all."""
    texts = [fields.get(column, "") for column in _BOX]
    if not any(texts):
        return True, None
    box = make_box(texts)
    return box is not None, box


def read_people(
    root: pathlib.Path, bad_files: BadFiles, left_out: LeftOut, *, camera_pattern: str = ""
) -> list[Sighting]:
    """Read a directory for each identity.

    The camera is a directory within it (`anna/entrance/0001.jpg`), or the number behind c or cam in
    a file's name (`anna/c1_0001.jpg`). If no file has one, all are of one camera.

    Args:
        root: the directory.
        bad_files: what is done about files that are no images or lack a camera.
        left_out: gets nothing.
        camera_pattern: regular expression whose first group is the camera in a file's path
            (`anna/2024-01-01_entrance_17.jpg`), instead.

    Raises:
        NotFoundError: there is no such directory.
        UserError: such files, unless skipped.
    """
    images, bad = list_images(root, recursive=True)
    loose = [name for name in images if "/" not in name]
    bad_files.report(str(root), sorted(bad + loose), "that are no image in an identity's directory")
    inside = sorted(set(images) - set(loose), key=natural_key)
    cameras = {name: _find_camera(name, camera_pattern) for name in inside}
    if any(cameras.values()) or camera_pattern:
        lacking = [name for name, camera in cameras.items() if not camera]
        expected = (
            f"without a camera; expected a path that {camera_pattern!r} matches"
            if camera_pattern
            else "without a camera, which others have; expected PERSON/CAMERA/0001.jpg or "
            "PERSON/c1_0001.jpg"
        )
        bad_files.report(str(root), lacking, expected)
        inside = [name for name in inside if cameras[name]]
    return [
        Sighting(
            identity=name.partition("/")[0],
            camera=cameras[name] or "1",
            file=root / name,
            frame=i,
            box=None,
            origin=str(root / name),
        )
        for i, name in enumerate(inside, 1)
    ]


def _find_camera(name: str, pattern: str) -> str:
    _, *directories, file = name.split("/")
    if pattern:
        return find_camera(name, pattern)
    if directories:
        return "/".join(directories)
    match = CAMERA.search(file)
    return match[1] if match else ""

"""Reader of COCO-style JSON whose annotations name a person or a track."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mros_jax import files
from mros_jax.data.datasets.layouts import BadFiles
from mros_jax.data.own.pictures import is_video
from mros_jax.data.own.sightings import (
    LeftOut,
    Sighting,
    drop_repeated,
    keep_present,
    make_box,
    natural_key,
)
from mros_jax.errors import UserError


def read_coco(
    root: pathlib.Path,
    bad_files: BadFiles,
    left_out: LeftOut,
    *,
    images: str = "",
    identity_key: str = "track_id",
    camera_key: str = "video_id",
    shared_ids: bool = False,
    classes: Sequence[int] = (),
    every: int = 1,
) -> list[Sighting]:
    """Read COCO-style JSON: `images` (id, file_name) and `annotations` (image_id, bbox).

    Identity and camera are fields of an annotation, of its `attributes` (as CVAT writes them) or of
    its image, in this order. Annotations without identity and those of crowds are left out. A
    `video_id` is shown by the name that `videos` gives it. If no annotation has the camera's field,
    all are of one camera.

    Args:
        root: the JSON file.
        bad_files: what is done about wrong annotations and missing images.
        left_out: gets what is not considered.
        images: directory that file names are relative to; by default that of the JSON file.
        identity_key: field with the identity.
        camera_key: field with the camera.
        shared_ids: an identity is the same person in all cameras; otherwise in its own only.
        classes: categories (`category_id`) that are people; by default all.
        every: take each n-th image of a camera in the natural order of file names.

    Raises:
        NotFoundError: there is no such file.
        UserError: no such JSON; a wrong annotation or a missing image, unless skipped.
    """
    content = files.read_json(root)
    if not isinstance(content, dict):
        raise UserError(f"{root} is no object with images and annotations")
    pictures: dict[int | str, dict[str, Any]] = {}
    for picture in _records(root, content, "images"):
        number, name = picture.get("id"), picture.get("file_name")
        if isinstance(number, int | str) and isinstance(name, str) and not is_video(_path(name)):
            if number in pictures:
                raise UserError(f"{root}: two images have the id {number}")
            pictures[number] = picture
    videos = _name_videos(root, content)
    base = pathlib.Path(images).expanduser() if images else root.parent
    found, bad = [], []
    for i, annotation in enumerate(_records(root, content, "annotations")):
        origin = f"{root}, annotation {annotation.get('id', f'at place {i}')}"
        place = annotation.get("image_id")
        seen_on = pictures.get(place) if isinstance(place, int | str) else None
        bbox = annotation.get("bbox")
        box = make_box([str(number) for number in bbox]) if isinstance(bbox, list) else None
        if seen_on is None or box is None:
            bad.append(origin.rpartition(", ")[2])
            continue
        identity = _find(identity_key, annotation, seen_on)
        kind = annotation.get("category_id")
        if identity is None:
            left_out[f"without {identity_key} (see the option identity_key)"].append(origin)
        elif annotation.get("iscrowd") == 1:
            left_out["of a crowd"].append(origin)
        elif classes and kind not in classes:
            left_out[f"of category {kind} (see the option classes)"].append(origin)
        else:
            camera = _find(camera_key, annotation, seen_on)
            if camera is not None:
                camera = (
                    videos.get(camera, str(camera)) if camera_key == "video_id" else str(camera)
                )
            found.append((str(identity), camera, str(_path(seen_on["file_name"])), box, origin))
    bad_files.report(
        str(root),
        bad,
        "without an image_id that images has (with id and file_name, which is no video) or a bbox "
        "of left, top, width and height above 0",
        "annotation",
    )
    cameras = {camera for _, camera, *_ in found}
    if None in cameras and len(cameras) > 1:
        lacking = [origin for _, camera, *_, origin in found if camera is None]
        bad_files.report(
            str(root), lacking, f"without {camera_key}, which others have", "annotation"
        )
        found = [row for row in found if row[1] is not None]
    frames = _number_frames((camera, name) for _, camera, name, *_ in found)
    own = len(cameras) > 1 and not shared_ids
    sightings = []
    for identity, camera, name, box, origin in found:
        frame = frames[camera, name]
        if (frame - 1) % every:
            left_out[f"between the images taken (every={every})"].append(origin)
            continue
        who = f"{camera}/{identity}" if own else identity
        sightings.append(Sighting(who, camera or "1", base / name, frame, box, origin))
    what = "of an image and an identity"
    return keep_present(
        drop_repeated(sightings, lambda s: (s.file, s.identity), bad_files, str(root), what),
        bad_files,
    )


def _records(root: pathlib.Path, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{root} has no list of objects named {key}; expected COCO-style JSON")
    return records


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(name.replace("\\", "/"))  # as Windows writes it


def _name_videos(root: pathlib.Path, content: Mapping[str, Any]) -> dict[int | str, str]:
    """Find the names of videos, if all have one of their own."""
    videos = _records(root, content, "videos") if "videos" in content else []
    names = {video.get("name") for video in videos if isinstance(video.get("name"), str)}
    if len(names) < len(videos):
        return {}
    return {v["id"]: v["name"] for v in videos if isinstance(v.get("id"), int | str)}


def _find(key: str, annotation: Mapping[str, Any], picture: Mapping[str, Any]) -> int | str | None:
    """Find a field of an annotation, of its attributes, or of its image."""
    for place in (annotation, annotation.get("attributes"), picture):
        value = place.get(key) if isinstance(place, Mapping) else None
        if isinstance(value, int | str) and value != "":
            return value
    return None


def _number_frames(places: Iterable[tuple[Any, str]]) -> dict[tuple[Any, str], int]:
    """Number the images of each camera from 1, in the natural order of their names."""
    numbers: dict[tuple[Any, str], int] = {}
    count: collections.Counter[Any] = collections.Counter()
    for camera, name in sorted(set(places), key=lambda place: natural_key(place[1])):
        count[camera] += 1
        numbers[camera, name] = count[camera]
    return numbers

"""Pictures of people: cut out of frames, and written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mros_jax import console, extras
from mros_jax.data.datasets.layouts import BadFiles
from mros_jax.data.decoding import UnreadableImageError, read_image
from mros_jax.data.listing import IMAGE_SUFFIXES
from mros_jax.data.own.sightings import Box, LeftOut, Sighting
from mros_jax.data.prefetch import prefetch
from mros_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv")
JPEG_QUALITY = 95  # and colours at full resolution

Pixels = UInt8[np.ndarray, "_ _ 3"]


def is_video(file: pathlib.Path) -> bool:
    """Whether a file's name is a video's."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def read_video(file: pathlib.Path) -> Iterator[Pixels]:
    """Decode a video from its first frame to its last, each turned as it is to be shown.

    Nothing is sought: where a video can be entered, and how its times are rounded to frames,
    differs between containers; frame n is the n-th that comes out of the decoder.

    Raises:
        UserError: it cannot be opened or decoded, or has no frames; or the extra "video" is not
            installed.
    """
    extras.require("video", "a video")
    import av

    number = 0
    try:
        with av.open(os.fspath(file)) as container:
            if not container.streams.video:
                raise UserError(f"{file} has no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                number += 1
                yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    except av.FFmpegError as error:
        what = f"after frame {number} it" if number else "it"
        raise UserError(
            f"{file}: {what} cannot be decoded ({error.strerror}); write it anew, for example by "
            f"ffmpeg -i {file.name} repaired.mp4"
        ) from error
    if not number:
        raise UserError(f"{file} is a video without frames")


def measure(file: pathlib.Path) -> tuple[int, int]:
    """Height and width of an image, or of the first frame of a video.

    Raises:
        UserError: it cannot be read.
    """
    pixels = next(read_video(file)) if is_video(file) else read_image(file).pixels
    return pixels.shape[0], pixels.shape[1]


def cut(pixels: Pixels, box: Box) -> Pixels:
    """Cut a box out of a picture: rounded to whole pixels, and as much of it as the picture has.

    Returns:
        Its pixels; an empty array if it lies outside of the picture.
    """
    left, top, width, height = box
    edges = np.rint([top, top + height, left, left + width])
    inside = np.clip(edges, 0, np.repeat(pixels.shape[:2], 2)).astype(int)
    first, last, start, end = inside.tolist()
    return pixels[first:last, start:end]


def write_pictures(
    sightings: Sequence[Sighting],
    directory: pathlib.Path,
    bad_files: BadFiles,
    left_out: LeftOut,
    *,
    image_format: str = "jpeg",
    min_size: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> list[tuple[Sighting, pathlib.Path]]:
    """Write a picture of every sighting; every file is read once, and videos in order.

    What is cut out is encoded anew, as JPEG (quality 95, colours at full resolution) or PNG, and so
    are whole frames of videos. Where there is no box, an image's file is copied as it is.

    Args:
        sightings: who was seen where.
        directory: that exists, for the pictures.
        bad_files: what is done about images that cannot be read, and frames that videos lack.
        left_out: gets boxes outside of their frames and those that are too small.
        image_format: "jpeg" or "png", of what is cut out.
        min_size: smallest height and width of what a picture has of a box.
        progress: show a progress bar.

    Returns:
        Those of which there is a picture, in the order of `sightings`, and the file written.

    Raises:
        UserError: a video cannot be decoded; an image cannot be read, unless such are skipped.
    """

    def write(task: _Task) -> list[tuple[int, pathlib.Path | _Fault]]:
        try:
            pixels = task.load()
        except UnreadableImageError as error:
            return [(row, _Fault(error.reason, unreadable=True)) for row in task.rows]
        return [(row, write_one(pixels, row)) for row in task.rows]

    def write_one(pixels: Pixels, row: int) -> pathlib.Path | _Fault:
        sighting, path = sightings[row], directory / str(row)
        suffix = sighting.file.suffix.lower()
        if sighting.box is None and suffix in IMAGE_SUFFIXES:
            path = path.with_suffix(suffix)
            path.write_bytes(sighting.file.read_bytes())
            return path
        part = pixels if sighting.box is None else cut(pixels, sighting.box)
        if not part.size:
            return _Fault("outside of the frame")
        if part.shape[0] < min_size[0] or part.shape[1] < min_size[1]:
            return _Fault(f"of less than {min_size[0]} x {min_size[1]} pixels in the frame")
        image = PIL.Image.fromarray(np.ascontiguousarray(part))
        if image_format == "png":
            path = path.with_suffix(".png")
            image.save(path)
        else:
            path = path.with_suffix(".jpg")
            image.save(path, quality=JPEG_QUALITY, subsampling=0)
        return path

    written: dict[int, pathlib.Path] = {}
    unreadable = []
    threads = os.cpu_count() or 1
    made = prefetch(_find_tasks(sightings), write, depth=2 * threads, num_threads=threads)
    bar = console.progress(total=len(sightings), desc="cutting out", disable=not progress)
    with contextlib.closing(made), bar:  # closed: whatever happens, no thread writes any more
        for outcomes in made:
            for row, outcome in outcomes:
                if isinstance(outcome, pathlib.Path):
                    written[row] = outcome
                elif outcome.unreadable:
                    unreadable.append(f"{sightings[row].origin} ({outcome.reason})")
                else:
                    left_out[outcome.reason].append(sightings[row].origin)
            bar.update(len(outcomes))
    bad_files.report("pictures", unreadable, "that cannot be read", "sighting")
    return [(sightings[row], written[row]) for row in sorted(written)]


@dataclasses.dataclass(frozen=True)
class _Fault:
    reason: str
    unreadable: bool = False


@dataclasses.dataclass(frozen=True)
class _Task:
    """A picture, and the rows of those who are seen on it."""

    load: Callable[[], Pixels]
    rows: list[int]


def _find_tasks(sightings: Sequence[Sighting]) -> Iterator[_Task]:
    """Find all pictures, one after the other."""
    rows_of: dict[pathlib.Path, list[int]] = {}
    for row, sighting in enumerate(sightings):
        rows_of.setdefault(sighting.file, []).append(row)
    for file, rows in rows_of.items():
        if is_video(file):
            rows_at: dict[int, list[int]] = {}
            for row in rows:
                rows_at.setdefault(sightings[row].frame, []).append(row)
            yield from _find_frames(file, rows_at)
        else:
            yield _Task(functools.partial(_read, file), rows)


def _find_frames(file: pathlib.Path, rows_at: dict[int, list[int]]) -> Iterator[_Task]:
    last, number = max(rows_at), 0
    for number, pixels in enumerate(read_video(file), 1):
        if number in rows_at:
            yield _Task(functools.partial(np.asarray, pixels), rows_at[number])
        if number == last:
            return
    for frame, rows in rows_at.items():
        if frame > number:
            reason = f"frame {frame}; {file.name} has {number}"
            yield _Task(functools.partial(_refuse, file, reason), rows)


def _read(file: pathlib.Path) -> Pixels:
    return read_image(file).pixels


def _refuse(file: pathlib.Path, reason: str) -> Pixels:
    raise UnreadableImageError(str(file), reason)

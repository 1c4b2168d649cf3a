"""Reader of tracks as MOTChallenge writes them, beside their videos or frames."""

from __future__ import annotations

import configparser
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

from mros_jax.data.datasets.layouts import BadFiles
from mros_jax.data.listing import is_clutter, list_images
from mros_jax.data.own.pictures import is_video, measure
from mros_jax.data.own.sightings import LeftOut, Sighting, drop_repeated, find_camera, natural_key
from mros_jax.data.text import parse_number, read_lines, read_text
from mros_jax.errors import NotFoundError, UserError

_TRACKS = ("gt/gt.txt", "det/det.txt")
_LAYOUT = (
    "a directory with gt/gt.txt and img1/ or a video; several of them; or NAME.txt beside NAME.mp4 "
    "or a directory NAME of frames"
)


@dataclasses.dataclass(frozen=True)
class _Sequence:
    name: str
    tracks: pathlib.Path
    frames: pathlib.Path  # a video, or a directory of images
    size: tuple[int, int] | None = None  # height and width that seqinfo.ini states


@dataclasses.dataclass(frozen=True)
class _Line:
    origin: str
    frame: int
    number: int  # of the track; negative: none
    box: tuple[float, float, float, float]
    confidence: float = -1.0  # negative, here and below: not stated
    kind: float = -1.0
    visibility: float = -1.0


def read_mot(
    root: pathlib.Path,
    bad_files: BadFiles,
    left_out: LeftOut,
    *,
    shared_ids: bool = False,
    camera_pattern: str = "",
    classes: Sequence[int] = (1,),
    min_confidence: float = 0.0,
    min_visibility: float = 0.0,
    every: int = 1,
) -> list[Sighting]:
    """Read tracks in MOTChallenge's format; every sequence is a camera, every track an identity.

    A line is `frame,id,left,top,width,height` and, if wanted, `confidence,class,visibility`,
    divided by commas or blanks; frames count from 1. Lines of ten numbers end in `x,y,z` instead of
    class and visibility, as those of most trackers and of 2D MOT 2015. A confidence of 0 marks what
    is not to be considered; negative numbers say that something is not known, and keep the line.
    (MOTChallenge counts pixels from 1 and trackers from 0; this pixel is not corrected.)

    Frames are videos, or images that are named by their numbers; images that count from 0 are moved
    by one.

    Args:
        root: a sequence (`gt/gt.txt`, or `det/det.txt` if it has identities, beside `img1/` or a
            video, and `seqinfo.ini` if wanted), a directory of sequences, or one with `NAME.txt`
            beside `NAME.mp4` or `NAME/`.
        bad_files: what is done about wrong and repeated lines and missing frames.
        left_out: gets what is not considered.
        shared_ids: an id is the same person in all sequences; otherwise in its own only.
        camera_pattern: regular expression whose first group is the camera in a sequence's name.
        classes: those that are people; in MOTChallenge 1 is a pedestrian.
        min_confidence: of a line, where it states one.
        min_visibility: of a line, where it states one, 0 to 1.
        every: take each n-th frame, from the first on.

    Raises:
        NotFoundError: there is no such directory, or nothing of this kind in it.
        UserError: as said by its message, with file and line.
    """
    sequences = _find_sequences(root)
    sightings: list[Sighting] = []
    for sequence in sequences:
        lines = []
        for line in _read_lines(sequence.tracks, bad_files):
            reason = ""
            if line.number < 0:
                reason = "without identity (a negative id)"
            elif line.confidence == 0:
                reason = "not to be considered (confidence 0)"
            elif 0 < line.confidence < min_confidence:
                reason = f"of a confidence below {min_confidence:g}"
            elif line.kind >= 0 and line.kind not in classes:
                reason = f"of class {line.kind:g} (see the option classes)"
            elif 0 <= line.visibility < min_visibility:
                reason = f"of a visibility below {min_visibility:g}"
            elif (line.frame - 1) % every:
                reason = f"between the frames taken (every={every})"
            if reason:
                left_out[reason].append(line.origin)
            else:
                lines.append(line)
        camera = find_camera(sequence.name, camera_pattern) if camera_pattern else sequence.name
        if not camera:
            raise UserError(
                f"{sequence.name} is a sequence that camera_pattern {camera_pattern!r} does not "
                "match"
            )
        prefix = "" if shared_ids or len(sequences) == 1 else f"{sequence.name}/"
        seen = [
            Sighting(f"{prefix}{line.number}", camera, file, line.frame, line.box, line.origin)
            for line, file in _find_frames(sequence, lines, bad_files)
        ]
        place, what = str(sequence.tracks), "of a frame and an id"
        sightings += drop_repeated(seen, lambda s: (s.frame, s.identity), bad_files, place, what)
    return sightings


def _find_sequences(root: pathlib.Path) -> list[_Sequence]:
    if not root.is_dir():
        raise NotFoundError(f"{root} is no directory; expected {_LAYOUT}")
    if (single := _open_sequence(root)) is not None:
        return [single]
    places = [path for path in root.iterdir() if not is_clutter(path.name)]
    sequences = []
    for tracks in places:
        if tracks.suffix.lower() == ".txt" and tracks.is_file():
            beside = [p for p in places if p.stem == tracks.stem and is_video(p) and p.is_file()]
            if len(beside) > 1:
                raise UserError(f"{tracks} has {len(beside)} videos beside it; expected 1")
            directory = root / tracks.stem
            frames = beside[0] if beside else _choose_frames(directory, "img1")
            if frames is None:
                raise UserError(
                    f"{tracks} has no frames; expected a video such as {tracks.stem}.mp4, or a "
                    f"directory {tracks.stem} of images, beside it"
                )
            sequences.append(_Sequence(tracks.stem, tracks, frames))
    taken = {sequence.name for sequence in sequences}
    for directory in places:
        if directory.is_dir() and directory.name not in taken:
            sequence = _open_sequence(directory)
            sequences += [sequence] if sequence else []
    if not sequences:
        raise NotFoundError(f"{root} holds no tracks; expected {_LAYOUT}")
    sequences.sort(key=lambda sequence: natural_key(sequence.name))
    for one, other in itertools.pairwise(sequences):
        if one.name == other.name:
            raise UserError(
                f"{one.tracks} and {other.tracks} are both of a sequence {one.name}; give each a "
                "name of its own, in seqinfo.ini where that has one"
            )
    return sequences


def _open_sequence(directory: pathlib.Path) -> _Sequence | None:
    tracks = next((directory / name for name in _TRACKS if (directory / name).is_file()), None)
    if tracks is None:
        return None
    name, image_directory, size = directory.resolve().name, "img1", None
    info = directory / "seqinfo.ini"
    if info.is_file():
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(read_text(info))
            section = parser["Sequence"]
            name = section.get("name", name)
            image_directory = section.get("imDir", image_directory)
            if "imWidth" in section and "imHeight" in section:
                size = int(section["imHeight"]), int(section["imWidth"])
        except (configparser.Error, KeyError, ValueError) as error:
            raise UserError(
                f"{info} is no description of a sequence: {error}; expected [Sequence] with name, "
                "imDir, imWidth and imHeight"
            ) from error
    frames = _choose_frames(directory, image_directory)
    if frames is None:
        raise UserError(
            f"{directory} has tracks and no frames; expected {image_directory}/ with images, or a "
            "video"
        )
    return _Sequence(name, tracks, frames, size)


def _choose_frames(directory: pathlib.Path, image_directory: str) -> pathlib.Path | None:
    """Find what shows a sequence: images in a directory of its own, a video, or images."""
    if (directory / image_directory).is_dir():
        return directory / image_directory
    if not directory.is_dir():
        return None
    videos = sorted(path for path in directory.iterdir() if is_video(path))
    if len(videos) > 1:
        raise UserError(f"{directory} has {len(videos)} videos ({videos[0].name}, ...); expected 1")
    if videos:
        return videos[0]
    return directory if list_images(directory)[0] else None


def _read_lines(tracks: pathlib.Path, bad_files: BadFiles) -> list[_Line]:
    lines, bad = [], []
    for row, text in read_lines(tracks):
        line = _parse(text, f"{tracks}, line {row}")
        if line is None:
            bad.append(f"line {row} ({text})")
        else:
            lines.append(line)
    expected = (
        "not like frame,id,left,top,width,height,...: numbers, of which frame and id are whole, "
        "the frame is 1 or more, width and height are above 0"
    )
    bad_files.report(str(tracks), bad, expected, "line")
    return lines


def _parse(text: str, origin: str) -> _Line | None:
    numbers = [parse_number(field) for field in re.split(r"\s*,\s*|\s+", text)]
    if len(numbers) < 6 or any(number is None for number in numbers):
        return None
    frame, track, left, top, width, height, *rest = (number or 0.0 for number in numbers)
    if not (frame.is_integer() and track.is_integer() and min(width, height) > 0 and frame >= 1):
        return None
    if len(rest) > 3:  # confidence, and a place in the world
        rest = rest[:1]
    return _Line(origin, int(frame), int(track), (left, top, width, height), *rest)


def _find_frames(
    sequence: _Sequence, lines: list[_Line], bad_files: BadFiles
) -> Iterator[tuple[_Line, pathlib.Path]]:
    """Find the image or the video of each line."""
    if is_video(sequence.frames):
        numbered = None
        first = sequence.frames
    else:
        numbered = _number_images(sequence.frames)
        first = next(iter(numbered.values()))
    if sequence.size is not None and (seen := measure(first)) != sequence.size:
        raise UserError(
            f"{first} is {seen[0]} x {seen[1]} (height x width), and seqinfo.ini says "
            f"{sequence.size[0]} x {sequence.size[1]}: the boxes would not fit"
        )
    if numbered is None:
        yield from ((line, sequence.frames) for line in lines)
        return
    missing = sorted({line.frame for line in lines} - set(numbered))
    texts = [f"frame {number}" for number in missing]
    bad_files.report(str(sequence.frames), texts, "without an image", "frame")
    yield from ((line, numbered[line.frame]) for line in lines if line.frame in numbered)


def _number_images(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    images, _ = list_images(directory)
    numbered: dict[int, pathlib.Path] = {}
    for name in images:
        match = re.search("([0-9]+)$", pathlib.PurePath(name).stem)
        if match is None:
            raise UserError(f"{directory / name} has no frame number at the end of its name")
        number = int(match[1])
        if number in numbered:
            raise UserError(f"{directory}: {numbered[number].name} and {name} are the same frame")
        numbered[number] = directory / name
    if not numbered:
        raise UserError(f"{directory} holds no images")
    shift = 1 if 0 in numbered else 0
    return {number + shift: path for number, path in sorted(numbered.items())}

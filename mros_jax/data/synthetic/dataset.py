"""The embedded data set: pedestrians that the project renders itself, in a Market-1501 layout.

    python -m mros_jax.data.synthetic --out DIR --preset demo

No files are needed to train on it; writing it as JPEG exercises the reader of real data. See
`pedestrians.py` for what a person and a picture are, and `rendering.py` for how they are drawn.
"""

import argparse
import dataclasses
import hashlib
import inspect
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mros_jax import console
from mros_jax.data.images import Picture, hash_bytes
from mros_jax.data.prefetch import prefetch
from mros_jax.data.splits import DISTRACTOR_PID, JUNK_PID, Dataset, Split, relabel
from mros_jax.data.synthetic import pedestrians, rendering
from mros_jax.errors import UserError

T = TypeVar("T")

# Part of every cache key: a change of the pictures must change it.
VERSION = 2
CHUNK = 32  # images per call of the renderer
_GOOD, _JUNK, _NOBODY = 0, 1, 2
_STREAMS = {"train": 0, "query": 1, "gallery": 2}

PRESETS: dict[str, dict[str, int]] = {
    # Market-1501's numbers: 12,936 / 3,368 / 19,732 images (3,819 junk, 2,793 distractors).
    "market": {
        "num_train_pids": 751,
        "num_test_pids": 750,
        "num_train_images": 12_936,
        "num_query_images": 3_368,
        "num_gallery_images": 13_120,
        "num_distractors": 2_793,
        "num_junk": 3_819,
    },
    # Trains in minutes on two cores, and leaves room above a small network.
    "demo": {
        "num_train_pids": 64,
        "num_test_pids": 40,
        "images_per_pid_and_camera": 3,
        "num_distractors": 60,
        "num_junk": 40,
        "lookalikes": 2,
    },
    # For tests.
    "small": {
        "num_train_pids": 12,
        "num_test_pids": 8,
        "num_cameras": 3,
        "images_per_pid_and_camera": 2,
        "num_distractors": 4,
        "num_junk": 3,
    },
}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What to render, one entry for each image."""

    numbers: np.ndarray  # (N,) int32: identity number, also of junk and distractors
    camids: np.ndarray  # (N,) int32, from 1
    flaws: np.ndarray  # (N,) int32: 0 good box, 1 junk box, 2 nobody in it
    places: np.ndarray  # (N,) int32: place in the whole split, which decides the picture

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: np.ndarray) -> "_Rows":
        return _Rows(self.numbers[rows], self.camids[rows], self.flaws[rows], self.places[rows])


def _rows(numbers: np.ndarray, camids: np.ndarray, flaws: np.ndarray | int = _GOOD) -> _Rows:
    flaws = np.broadcast_to(flaws, numbers.shape)
    places = np.arange(len(numbers))
    return _Rows(*(column.astype(np.int32) for column in (numbers, camids, flaws, places)))


@dataclasses.dataclass(frozen=True)
class Renderer:
    """The images of a rendered split (see `images.Images`), made when they are asked for.

    Attributes:
        rows: what is in each of them.
        seed: of the data set.
        stream: of the split.
        lookalikes: identities in a group.
        num_cameras: cameras of the data set.
        height: pixels.
        width: pixels.
        chunk: how many are rendered by one call.
    """

    rows: _Rows
    seed: int
    stream: int
    lookalikes: int
    num_cameras: int
    height: int
    width: int
    chunk: int = CHUNK

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> "Renderer":
        """Return these images only; they stay the same pictures."""
        return dataclasses.replace(self, rows=self.rows.take(np.asarray(rows)))

    def encoded(self, row: int) -> bytes:
        """Return an image as a PNG."""
        [pixels] = self.select(np.array([row])).render()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()

    def digest(self, *, num_threads: int | None = None, progress: bool = False) -> str:
        """Compute a digest of everything that decides the pixels; nothing is rendered for it."""
        total = hashlib.blake2b(digest_size=16)
        numbers = (self.seed, self.stream, self.lookalikes, self.height, self.width)
        total.update(f"synthetic {VERSION} {numbers} {len(self)}".encode())
        for field in dataclasses.fields(self.rows):
            total.update(getattr(self.rows, field.name).astype("<i4").tobytes())
        return total.hexdigest()

    def map(
        self,
        task: Callable[[Picture], T],
        *,
        num_threads: int | None = None,
        progress: bool = False,
    ) -> Iterator[T]:
        """Yield `task(picture)` for every image, in order."""
        row = 0
        options = {"desc": "rendering", "unit": " images", "disable": not progress}
        with console.progress(total=len(self), **options) as bar:
            for chunk in self.chunks(num_threads=num_threads):
                for pixels in chunk:
                    yield task(Picture(row, hash_bytes(pixels.tobytes()), pixels))
                    row += 1
                bar.update(len(chunk))

    def chunks(self, *, num_threads: int | None = None) -> Iterator[np.ndarray]:
        """Yield the images in order, uint8 (n, height, width, 3) with n <= `chunk`."""
        camids = np.arange(1, self.num_cameras + 1, dtype=np.int32)
        cameras = pedestrians.draw_cameras(self.seed, camids)
        starts = range(0, len(self), self.chunk)
        # The first alone, so that the threads find everything compiled.
        yield from (self._render(start, cameras) for start in starts[:1])
        threads = num_threads or os.cpu_count() or 1
        # A bounded number ahead: whoever writes the images to disk may be slower.
        yield from prefetch(
            starts[1:],
            lambda start: self._render(start, cameras),
            depth=2 * threads,
            num_threads=threads,
        )

    def _render(self, start: int, cameras: pedestrians.Camera) -> np.ndarray:
        index = np.arange(start, start + self.chunk)
        # The last chunk is filled up with one image: one shape, hence one compilation.
        rows = self.rows.take(np.minimum(index, len(self) - 1))
        people = pedestrians.draw_people(self.seed, rows.numbers, lookalikes=self.lookalikes)
        pictures = pedestrians.draw_pictures(
            self.seed, self.stream, rows.places, rows.numbers, rows.camids, rows.flaws
        )
        size = {"height": self.height, "width": self.width}
        images = rendering.render(people, pictures, cameras, rows.camids - 1, **size)
        return np.asarray(images)[: len(self) - start]

    def render(self) -> np.ndarray:
        """Render all images, uint8 (N, height, width, 3)."""
        images = np.empty((len(self), self.height, self.width, 3), np.uint8)
        start = 0
        for chunk in self.chunks():
            images[start : start + len(chunk)] = chunk
            start += len(chunk)
        return images


def _spread(rng: np.random.Generator, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Deals `total` out by chance over bins that get at least `low` and at most `high`."""
    counts = low.copy()
    weights = rng.gamma(2.0, size=len(low))  # some are seen more often than others
    while (left := total - int(counts.sum())) > 0:
        p = weights * (counts < high)
        counts += np.minimum(rng.multinomial(left, p / p.sum()), high - counts)
    return counts


def _make_cells(
    rng: np.random.Generator,
    pids: np.ndarray,
    num_cameras: int,
    num_cells: int | None,
    num_single: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Which identity walks past which camera: `num_cells` pairs (pid, camid), or all of them."""
    least = np.where(np.arange(len(pids)) < num_single, 1, min(2, num_cameras))
    most = np.where(np.arange(len(pids)) < num_single, 1, num_cameras)
    counts = most if num_cells is None else _spread(rng, num_cells, least, most)
    place = np.argsort(rng.random((len(pids), num_cameras)), axis=1)
    row, camera = np.nonzero(place < counts[:, None])
    return pids[row], camera + 1


def _fill_cells(
    rng: np.random.Generator, cells: tuple[np.ndarray, np.ndarray], each: int, total: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """`each` images of every cell, or `total` in all with at least one of every cell."""
    pids, camids = cells
    counts = np.full(len(pids), each)
    if total is not None:
        counts = _spread(rng, total, np.ones_like(counts), np.full(len(pids), total))
    return np.repeat(pids, counts), np.repeat(camids, counts)


def _make_split(
    name: str, rows: _Rows, pids: np.ndarray, frames: np.ndarray, settings: dict[str, Any]
) -> Split:
    """Names the rows as Market-1501 does and orders them by name, as its reader would."""
    sequences = 1 + (7 * rows.numbers + 3 * rows.camids) % 6
    box = 0 if name == "query" else 1
    columns = zip(pids, rows.camids, sequences, frames, strict=True)
    names = np.array(
        [
            f"{'-1' if pid < 0 else f'{pid:04d}'}_c{camid}s{sequence}_{frame:06d}_{box:02d}.jpg"
            for pid, camid, sequence, frame in columns
        ],
        dtype=np.str_,
    )
    order = np.argsort(names)
    pids = pids[order].astype(np.int64)
    rows = rows.take(order)
    return Split(
        name=name,
        names=names[order],
        pids=pids,
        camids=rows.camids.astype(np.int64),
        sequences=sequences[order].astype(np.int64),
        images=Renderer(
            dataclasses.replace(rows, places=np.arange(len(rows), dtype=np.int32)),
            stream=_STREAMS[name],
            **{key: settings[key] for key in ("seed", "lookalikes", "height", "width")},
            num_cameras=settings["num_cameras"],
        ),
        labels=relabel(pids)[0] if name == "train" else None,
    )


def make_dataset(
    *,
    num_train_pids: int = 64,
    num_test_pids: int = 40,
    num_cameras: int = 6,
    images_per_pid_and_camera: int = 3,
    num_train_images: int | None = None,
    num_query_images: int | None = None,
    num_gallery_images: int | None = None,
    num_distractors: int = 60,
    num_junk: int = 40,
    num_single_camera_pids: int = 0,
    lookalikes: int = 4,
    height: int = 128,
    width: int = 64,
    seed: int = 0,
) -> Dataset:
    """Make the synthetic data set; nothing is rendered before its images are asked for.

    Training identities are 1..num_train_pids, test identities the next ones. Every camera sees
    every identity, unless the number of images is given: then identities are seen by two cameras or
    more, unevenly, as in real data. The query holds one image for every test identity and camera.

    Args:
        num_train_pids: identities to train on.
        num_test_pids: identities in query and gallery.
        num_cameras: cameras, shared by all splits.
        images_per_pid_and_camera: training and gallery images of one identity in one camera.
        num_train_images: all training images, instead of `images_per_pid_and_camera`.
        num_query_images: all queries, instead of one for every test identity and camera.
        num_gallery_images: gallery images of test identities, instead of
            `images_per_pid_and_camera`.
        num_distractors: gallery images with pid 0: other people, and boxes with nobody in them.
        num_junk: gallery images with pid -1: badly cut or hidden test identities.
        num_single_camera_pids: test identities that only one camera sees, so that their queries
            have no true match. Every other query has one.
        lookalikes: identities in a group that differ in details only, 1 to 8 (1: no look-alikes).
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        seed: decides everything that is drawn.

    Raises:
        UserError: numbers that cannot be met together.
    """
    settings = dict(locals())
    _check(settings)
    train_pids = 1 + np.arange(num_train_pids)
    test_pids = 1 + num_train_pids + np.arange(num_test_pids)
    first_distractor = 1 + num_train_pids + num_test_pids

    rng = np.random.default_rng([seed, 0])
    num_cells = None
    if num_train_images is not None:
        # About 4.5 cameras of 6 see an identity in Market-1501.
        num_cells = min(num_train_images, round(0.75 * num_cameras * num_train_pids))
        num_cells = max(num_cells, min(2, num_cameras) * num_train_pids)
    cells = _make_cells(rng, train_pids, num_cameras, num_cells)
    train = _rows(*_fill_cells(rng, cells, images_per_pid_and_camera, num_train_images))

    rng = np.random.default_rng([seed, 1])
    cells = _make_cells(rng, test_pids, num_cameras, num_query_images, num_single_camera_pids)
    query = _rows(*cells)
    good = _fill_cells(rng, cells, images_per_pid_and_camera, num_gallery_images)
    others = first_distractor + np.arange(num_distractors)
    numbers = np.concatenate([good[0], others, rng.choice(test_pids, num_junk)])
    strays = rng.integers(1, num_cameras + 1, num_distractors + num_junk)
    pids, flaws = numbers.copy(), np.full(len(numbers), _GOOD)
    pids[len(good[0]) :], pids[len(numbers) - num_junk :] = DISTRACTOR_PID, JUNK_PID
    # A detector's false alarms are distractors as well: every third box holds nobody.
    flaws[len(good[0]) + 2 : len(numbers) - num_junk : 3] = _NOBODY
    flaws[len(numbers) - num_junk :] = _JUNK
    gallery = _rows(numbers, np.concatenate([good[1], strays]), flaws)

    train_frames = 1 + 5 * np.arange(len(train))
    test_frames = 1 + 5 * rng.permutation(len(query) + len(gallery))
    query_frames, gallery_frames = np.split(test_frames, [len(query)])
    train_split = _make_split("train", train, train.numbers, train_frames, settings)
    return Dataset(
        name="synthetic",
        train=train_split,
        query=_make_split("query", query, query.numbers, query_frames, settings),
        gallery=_make_split("gallery", gallery, pids, gallery_frames, settings),
        pid_of_label=relabel(train_split.pids)[1],
    )


def _check(s: dict[str, Any]) -> None:
    least = {"num_train_pids": 1, "num_test_pids": 1, "images_per_pid_and_camera": 1, "seed": 0}
    for name, low in {
        **least,
        "num_cameras": 1,
        "lookalikes": 1,
        "height": 16,
        "width": 16,
    }.items():
        if s[name] < low:
            raise UserError(f"{name} is {s[name]}; expected at least {low}")
    if s["seed"] >= 2**31:
        raise UserError(f"seed is {s['seed']}; expected less than 2**31")
    for name in ("num_distractors", "num_junk", "num_single_camera_pids"):
        if s[name] < 0:
            raise UserError(f"{name} is {s[name]}; expected 0 or more")
    if s["height"] % 16 or s["width"] % 16:
        raise UserError(
            f"height x width is {s['height']} x {s['width']}; both are to be multiples of 16"
        )
    if s["lookalikes"] > len(pedestrians.DETAILS):
        raise UserError(
            f"lookalikes is {s['lookalikes']}; at most {len(pedestrians.DETAILS)}, "
            "one for every detail that they can differ in"
        )
    single, test = s["num_single_camera_pids"], s["num_test_pids"]
    if single > test:
        raise UserError(f"num_single_camera_pids is {single}, more than num_test_pids {test}")
    if s["num_cameras"] < 2 and single < test:
        raise UserError(
            "num_cameras is 1, so that no query has a true match in another camera; "
            f"use 2 or more, or say so with num_single_camera_pids={test}"
        )
    low = single + 2 * (test - single)
    high = single + s["num_cameras"] * (test - single)
    queries = s["num_query_images"]
    if queries is not None and not low <= queries <= high:
        raise UserError(
            f"num_query_images is {queries}; with {test} test identities in {s['num_cameras']} "
            f"cameras, one query per identity and camera, expected {low} to {high}"
        )
    low = queries or high
    if s["num_gallery_images"] is not None and s["num_gallery_images"] < low:
        raise UserError(
            f"num_gallery_images is {s['num_gallery_images']}; expected at least {low}, one for "
            "every identity and camera in the query"
        )
    low = min(2, s["num_cameras"]) * s["num_train_pids"]
    if s["num_train_images"] is not None and s["num_train_images"] < low:
        raise UserError(
            f"num_train_images is {s['num_train_images']}; expected at least {low}, one in each of "
            "two cameras for every identity"
        )


FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def write_dataset(dataset: Dataset, out: str | os.PathLike[str], *, progress: bool = True) -> None:
    """Write a data set in Market-1501's layout as JPEG (quality 95).

    Args:
        dataset: from `make_dataset`.
        out: a directory that is empty or does not exist yet. Each of the three folders in it
            appears under its name only when it is complete.
        progress: whether to show a progress bar.

    Raises:
        UserError: `out` holds something already, or is a file.
        OSError: it cannot be written.
    """
    out = pathlib.Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a directory to write to")
    if out.exists() and any(out.iterdir()):
        raise UserError(
            f"{out} is not empty; nothing was written. Name another directory, or remove this one"
        )
    out.mkdir(parents=True, exist_ok=True)
    for split in dataset.splits:
        with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as scratch:
            folder = pathlib.Path(scratch) / "images"
            folder.mkdir()

            def save(picture: Picture, split: Split = split, folder: pathlib.Path = folder) -> None:
                path = folder / str(split.names[picture.row])
                Image.fromarray(picture.require()).save(path, quality=95)

            for _ in split.images.map(save, progress=progress):
                pass
            os.replace(folder, out / FOLDERS[split.name])


def main(argv: Sequence[str] | None = None) -> int:
    """Write a data set; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.data.synthetic",
        description="Render the synthetic data set and write it as JPEG in Market-1501's layout.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="directory, empty or not there yet")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo", help="sizes")
    for name in inspect.signature(make_dataset).parameters:
        parser.add_argument(f"--{name}", type=int, help=f"instead of the preset's {name}")
    options = vars(parser.parse_args(argv))
    out, preset = options.pop("out"), options.pop("preset")
    given = {name: value for name, value in options.items() if value is not None}
    dataset = make_dataset(**{**PRESETS[preset], **given})
    write_dataset(dataset, out)
    print(f"wrote {', '.join(f'{len(s):,} {s.name}' for s in dataset.splits)} images to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

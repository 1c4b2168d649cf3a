"""Reader of CUHK03: labeled and detected boxes, new and classic protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Int64

from mros_jax import extras
from mros_jax.data.datasets.layouts import (
    MARKET_PARTS,
    BadFiles,
    Entry,
    MissingDataError,
    OnBadImage,
    make_dataset,
    read_market_layout,
)
from mros_jax.data.images import EncodedImages
from mros_jax.data.splits import Dataset, Split
from mros_jax.errors import UserError

Kind = str  # "labeled" or "detected"
_MAT_PLACES = ("cuhk-03.mat", "cuhk03_release/cuhk-03.mat")
_IMAGES_PER_VIEW = 5


def read_new_protocol(
    root: pathlib.Path, *, kind: Kind, on_bad_image: OnBadImage = "error"
) -> Dataset:
    """Read CUHK03 (Li et al., CVPR 2014) with the 767 / 700 split of Zhong et al., CVPR 2017.

    Any of these will do, looked for in this order: the image folders of CUHK03-NP
    (`labeled/bounding_box_train/`, ...); the split file `cuhk03_new_protocol_config_labeled.mat`
    with extracted images in `images_labeled/`; the split file with the original `cuhk-03.mat`
    (needs h5py). Camera 1 or 2 is the view; a person is seen by one of the five camera pairs only.

    Args:
        root: the directory with them.
        kind: "labeled" boxes, drawn by hand, or "detected" ones.
        on_bad_image: what to do about files whose names cannot be read: "error" or "skip".

    Raises:
        MissingDataError: none of them is there.
        UserError: a misnamed file, or an empty split.
        UserError: `cuhk-03.mat` is to be read and h5py is not installed.
    """
    name = f"cuhk03_{kind}"
    bad_files = BadFiles(on_bad_image)
    for base in (root / kind, root / "cuhk03-np" / kind, root / "CUHK03-NP" / kind, root):
        if all((base / part).is_dir() for part in MARKET_PARTS):
            _, parts = read_market_layout(base, (), bad_files)
            return make_dataset(name, str(base), *parts, bad_files=bad_files)
    config = root / f"cuhk03_new_protocol_config_{kind}.mat"
    if not config.is_file():
        raise MissingDataError(f"without any form of CUHK03 with {kind} boxes")
    folder = root / f"images_{kind}"
    mat = None if folder.is_dir() else _Mat(_find_mat(root))
    parts = _read_config(config, folder)
    dataset = make_dataset(name, str(config), *parts, bad_files=bad_files)
    return dataset if mat is None else _read_from_mat(dataset, mat, kind)


def read_classic(root: pathlib.Path, *, kind: Kind, test_set: int = 0) -> Dataset:
    """Read CUHK03 with one of its 20 original test sets of 100 identities.

    All other identities (1,367) train. Queries are the test images of view 1, the gallery those of
    view 2; the single-shot evaluation draws one gallery image per identity, see `draw_trials`.
    Pids number the persons of the first camera pair from 1, then those of the second, and so on.

    Args:
        root: the directory with `cuhk-03.mat`, or with `cuhk03_release/`.
        kind: "labeled" or "detected" boxes.
        test_set: which test set, 0..19.

    Raises:
        MissingDataError: `cuhk-03.mat` is not there.
        UserError: there is no such test set.
        UserError: h5py is not installed.
    """
    name = f"cuhk03_{kind}_classic"
    mat = _Mat(_find_mat(root))
    test, people = mat.test_set(test_set), mat.people(kind)
    offset = 0
    parts: dict[str, list[Entry]] = {"train": [], "query": [], "gallery": []}
    for pair, persons in enumerate(people, 1):
        for person, present in enumerate(persons, 1):
            for image in np.flatnonzero(present) + 1:
                view = 1 if image <= _IMAGES_PER_VIEW else 2
                part = "train"
                if (pair, person) in test:
                    part = "query" if view == 1 else "gallery"
                file = f"{pair}_{person:03d}_{view}_{image:02d}.png"
                parts[part].append(Entry(pathlib.Path(file), offset + person, view, name=file))
        offset += len(persons)
    dataset = make_dataset(name, str(mat.path), *parts.values(), bad_files=BadFiles("error"))
    return _read_from_mat(dataset, mat, kind)


def draw_trials(
    gallery: Split, *, trials: int = 100, rng: np.random.Generator
) -> Int64[np.ndarray, "trials identities"]:
    """Draw the galleries of the classic protocol: one image of every identity, `trials` times.

    Every row selects the columns of a distance matrix (queries x gallery) that one trial is
    evaluated on; the result of the protocol is the mean over the trials.

    Args:
        gallery: the gallery split.
        trials: number of draws; 100 is usual.
        rng: where the randomness comes from.

    Returns:
        (trials, identities) indices into the gallery, identities in ascending order of pid.
    """
    order = np.argsort(gallery.pids, kind="stable")
    _, first, counts = np.unique(gallery.pids[order], return_index=True, return_counts=True)
    chosen: np.ndarray = order[first + rng.integers(counts, size=(trials, len(counts)))]
    return chosen.astype(np.int64)


def _read_config(config: pathlib.Path, folder: pathlib.Path) -> list[list[Entry]]:
    """Read training, query and gallery from the split file of the new protocol."""
    import scipy.io

    try:
        fields = scipy.io.loadmat(config)
        files = [str(entry[0]) for entry in fields["filelist"].reshape(-1)]
        pids, camids = (fields[field].reshape(-1) for field in ("labels", "camId"))
        return [
            [
                Entry(folder / files[i], int(pids[i]), int(camids[i]), name=files[i])
                for i in fields[f"{part}_idx"].reshape(-1).astype(int) - 1
            ]
            for part in ("train", "query", "gallery")
        ]
    except PermissionError:
        raise
    except Exception as error:  # scipy raises many types on damaged files
        raise UserError(
            f"{config} is no split file of CUHK03's new protocol ({type(error).__name__}: "
            f"{error}); fetch it again"
        ) from error


def _find_mat(root: pathlib.Path) -> pathlib.Path:
    for place in _MAT_PLACES:
        if (root / place).is_file():
            return root / place
    raise MissingDataError(f"without {' or '.join(_MAT_PLACES)}")


def _read_from_mat(dataset: Dataset, mat: _Mat, kind: Kind) -> Dataset:
    """Let the images come out of cuhk-03.mat instead of files."""

    def replace(split: Split) -> Split:
        names = split.names.tolist()
        images = EncodedImages(lambda row: mat.read(kind, names[row]), len(names))
        return dataclasses.replace(split, images=images)

    return dataclasses.replace(
        dataset,
        train=replace(dataset.train),
        query=replace(dataset.query),
        gallery=replace(dataset.gallery),
    )


class _Mat:
    """`cuhk-03.mat`, a MATLAB 7.3 (HDF5) file of nested cells; arrays are stored transposed."""

    def __init__(self, path: pathlib.Path):
        extras.require("cuhk03", f"the HDF5 file {path}")
        import h5py

        self.path = path
        self._h5py = h5py
        self._lock = threading.Lock()

    @functools.cached_property
    def _file(self) -> Any:
        return self._h5py.File(self.path, "r")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Say of which file an error is; HDF5 raises many types on damaged ones."""
        try:
            yield
        except (UserError, PermissionError):
            raise
        except Exception as error:
            raise UserError(
                f"{self.path} is damaged or not CUHK03's ({type(error).__name__}: {error}); "
                "unpack it again"
            ) from error

    def test_set(self, number: int) -> set[tuple[int, int]]:
        """Return the (camera pair, person) of a test set, both counted from 1."""
        with self._reading():
            sets = self._file["testsets"][0]
            if not 0 <= number < len(sets):
                raise UserError(f"test_set must be in 0..{len(sets) - 1}, got {number}")
            return {(int(pair), int(person)) for pair, person in self._file[sets[number]][:].T}

    def people(self, kind: str) -> list[np.ndarray]:
        """Return for every camera pair (persons, 10) bool: which images there are."""
        with self._reading():
            return [
                np.array([[self._file[cell].ndim == 3 for cell in person] for person in cells.T])
                for cells in (self._file[pair][:] for pair in self._file[kind][0])
            ]

    def read(self, kind: str, name: str) -> bytes:
        """Return image `pair_person_view_image.png` as a PNG."""
        pair, person, _, image = map(int, pathlib.PurePath(name).stem.split("_"))
        with self._lock:  # HDF5 is not safe to use from several threads
            cells = self._file[self._file[kind][0][pair - 1]]
            pixels = self._file[cells[image - 1, person - 1]][:].T
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "png", compress_level=1)
        return buffer.getvalue()

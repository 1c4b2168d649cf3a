"""Whatever bytes a reader meets, it says `UserError`: no other exception, and no hang.

Two seconds of it here; MROS_FUZZ_SECONDS=60 tries for longer.
"""

import io
import json
import os
import pathlib
import time
import warnings

import numpy as np
import PIL.Image
import pytest
import scipy.io

from mros_jax import gallery
from mros_jax.data import cache
from mros_jax.data.datasets import prepared
from mros_jax.data.datasets.cuhk03 import _Mat
from mros_jax.data.datasets.layouts import BadFiles, parse_market_name
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.decoding import decode_image
from mros_jax.data.own.preparation import FORMATS
from mros_jax.data.own.sightings import LeftOut
from mros_jax.data.text import read_lines, read_table
from mros_jax.errors import UserError

SECONDS = float(os.environ.get("MROS_FUZZ_SECONDS", 2.5))
SLOWEST = 10.0  # a single input

WORDS = [
    *("", "0", "-1", "1", "3000000000", str(2**63), "9" * 400, "1e5", "nan", "1.0", "x", "ä", "٣"),
    *("train", "query", "gallery", "path", "pid", '"', "'", "\0", "\n", "\r\n", ",", ";", "\t"),
    *("../x", "a\\b.jpg", "/", "#", "\ufeff", "\u2028", "0001_c1s1_000001_00.jpg", "0000_000_01_x"),
]


def mutate(rng, data):
    """Random bytes, a cut, a few changed bytes, a piece twice or a piece gone."""
    kind = rng.integers(5)
    if kind == 0 or not data:
        return rng.bytes(int(rng.integers(0, 300)))
    cut = int(rng.integers(len(data)))
    if kind == 1:
        return data[:cut]
    if kind == 2:
        changed = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 20)):
            changed[place] = rng.integers(256)
        return bytes(changed)
    length = int(rng.integers(1, 100))
    if kind == 3:
        return data[:cut] + data[cut : cut + length] * 2 + data[cut + length :]
    return data[:cut] + data[cut + length :]


def make_text(rng):
    if rng.integers(3) == 0:
        return rng.bytes(int(rng.integers(0, 200)))
    rows = (",".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(rng.integers(1, 6)))
    header = "path,pid,camid,split\n" if rng.integers(4) else ""
    encoding = rng.choice(["utf-8", "utf-16", "utf-8-sig", "utf-32"])
    return mutate(rng, (header + "\n".join(rows)).encode(encoding))


def encoded_images():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    grey = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    kinds = [
        (PIL.Image.fromarray(pixels), f) for f in ("jpeg", "png", "tiff", "webp", "bmp", "gif")
    ]
    kinds += [(PIL.Image.fromarray(pixels), "jpeg2000"), (PIL.Image.fromarray(pixels), "ppm")]
    kinds += [
        (grey, "png"),
        (grey, "tiff"),
        (PIL.Image.fromarray(pixels[..., 0].astype(np.float32)), "tiff"),
    ]
    for image, format in kinds:
        buffer = io.BytesIO()
        image.save(buffer, format, **({"exif": exif} if format in ("jpeg", "png", "webp") else {}))
        yield buffer.getvalue()


class Trial:
    """Calls that may only return or raise UserError."""

    def __init__(self):
        self.refused = self.taken = 0

    def __call__(self, call, *arguments, **options):
        start = time.monotonic()
        try:
            call(*arguments, **options)
            self.taken += 1
        except UserError:
            self.refused += 1
        assert time.monotonic() - start < SLOWEST


@pytest.fixture
def trial():
    return Trial()


def rounds(share):
    """Numbers of rounds until the time of one test is over; always a few."""
    end = time.monotonic() + share * SECONDS
    for number in range(1_000_000_000):
        if number >= 5 and time.monotonic() > end:
            return
        yield number


@pytest.fixture
def _pil_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_pil_may_warn")
def test_images(trial):
    seeds = list(encoded_images())
    for number in rounds(0.25):
        rng = np.random.default_rng([1, number])
        trial(decode_image, mutate(rng, seeds[number % len(seeds)]), "x")
    assert trial.refused


def test_tables_and_lists(trial, tmp_path):
    path, listed = tmp_path / "images.csv", tmp_path / "list.txt"
    for number in rounds(0.2):
        rng = np.random.default_rng([2, number])
        path.write_bytes(make_text(rng))
        listed.write_bytes(path.read_bytes())
        trial(read_table, path, ("path", "pid", "camid", "split"))
        trial(read_lines, listed)
        trial(gallery.list_images, listed)
        for choice in ("error", "skip"):
            trial(load_dataset, "folder", tmp_path, on_bad_image=choice)
    assert trial.refused
    assert trial.taken


def test_msmt17_lists(trial, layout):
    for folder in ("train", "test"):
        layout.write(folder, "0000_000_01_x.jpg")
    line = b"0000_000_01_x.jpg 0\n"
    for number in rounds(0.15):
        rng = np.random.default_rng([3, number])
        for name in ("train", "val", "query", "gallery"):
            data = mutate(rng, line * 3) if rng.integers(2) else line
            (layout.root / f"list_{name}.txt").write_bytes(data)
        trial(load_dataset, "msmt17", layout.root, on_bad_image="skip")
    assert trial.refused


def test_market_names(trial):
    for number in rounds(0.05):
        rng = np.random.default_rng([4, number])
        stem = "_".join(rng.choice(["0001", "c1", "s1", *WORDS], rng.integers(1, 6)))
        parsed = parse_market_name(stem)
        assert parsed is None or all(abs(value) < 2**63 for value in parsed)


def test_split_file_of_cuhk03(trial, tmp_path):
    config = tmp_path / "cuhk03_new_protocol_config_labeled.mat"
    column = np.array([[1], [1]], np.uint16)
    fields = {"filelist": np.array([["a.png"], ["b.png"]], dtype=object), "labels": column}
    parts = {f"{part}_idx": column[:1] for part in ("train", "query", "gallery")}
    scipy.io.savemat(config, {**fields, "camId": column, **parts})
    whole = config.read_bytes()
    (tmp_path / "images_labeled").mkdir()
    trial(load_dataset, "cuhk03_labeled", tmp_path)
    assert trial.taken == 1
    for number in rounds(0.1):
        # Foreign bytes and cuts. Single bytes changed can crash SciPy's own reader of MATLAB files.
        rng = np.random.default_rng([5, number])
        damaged = rng.bytes(100) if rng.integers(2) else whole[: rng.integers(len(whole))]
        config.write_bytes(damaged)
        trial(load_dataset, "cuhk03_labeled", tmp_path)
    assert trial.refused


def test_cuhk03_mat(trial, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "cuhk-03.mat"
    with h5py.File(path, "w") as file:
        file["labeled"] = np.zeros((1, 5))
        file["testsets"] = np.zeros((1, 20))
    whole = path.read_bytes()
    for number in rounds(0.05):
        path.write_bytes(mutate(np.random.default_rng([6, number]), whole))
        trial(_Mat(path).test_set, 0)
        trial(_Mat(path).people, "labeled")
        trial(load_dataset, "cuhk03_labeled_classic", tmp_path)
    assert trial.refused


def test_image_cache(tmp_path, messages):
    path = tmp_path / "key-native.npy"
    images = np.zeros((3, 4, 2, 3), np.uint8)
    cache.save(path, cache.Decoding(images, True, {1: "cut"}, {0: ("L to RGB",)}))
    whole = {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".npy", ".json")}
    meta = json.loads(whole[".json"])
    for number in rounds(0.1):
        rng = np.random.default_rng([7, number])
        for suffix, data in whole.items():
            path.with_suffix(suffix).unlink(missing_ok=True)
            changed = mutate(rng, data) if rng.integers(2) else data
            path.with_suffix(suffix).write_bytes(changed)
        if rng.integers(3) == 0:
            field, value = rng.choice(list(meta)), rng.choice(np.array([None, 1, "x"]))
            path.with_suffix(".json").write_text(json.dumps({**meta, str(field): value}))
        found = cache.load(path, 4)
        assert found is None or found.images.shape == (3, 4, 2, 3)
    assert messages


def test_prepared_records(trial, market, tmp_path, capsys):
    path = prepared.prepare("market1501", market.root, tmp_path / "tfds")
    whole = {p: p.read_bytes() for p in sorted(path.iterdir())}
    for number in rounds(0.1):
        rng = np.random.default_rng([8, number])
        victim = list(whole)[number % len(whole)]
        for file, data in whole.items():
            file.unlink(missing_ok=True)
            file.write_bytes(mutate(rng, data) if file == victim else data)
        trial(load_and_read, tmp_path / "tfds")
    assert trial.refused


def load_and_read(root: pathlib.Path):
    for split in load_dataset("market1501", root).splits:
        split.images.digest()
        list(split.images.map(lambda picture: picture.error))


def test_own_data(trial, tmp_path):
    (tmp_path / "yard").mkdir()
    for name in ("yard/1.png", "a.jpg"):
        (tmp_path / name).write_bytes(b"")
    tracks, table, labels = (tmp_path / name for name in ("yard.txt", "own.csv", "own.json"))
    whole = json.dumps(
        {
            "images": [{"id": 1, "file_name": "a.jpg", "video_id": 2}],
            "videos": [{"id": 2, "name": "yard"}],
            "annotations": [{"id": 3, "image_id": 1, "bbox": [1, 2, 3, 4], "track_id": 5}],
        }
    )
    for number in rounds(0.2):
        rng = np.random.default_rng([9, number])
        text = make_text(rng)
        tracks.write_bytes(mutate(rng, b"1,2,3,4,5,6,1,1,1\n1,3,3,4,5,6\n") if number % 2 else text)
        table.write_bytes(text.replace(b"pid,camid", b"identity,camera"))
        labels.write_bytes(mutate(rng, whole.encode()))
        for name, root in (("mot", tmp_path), ("csv", table), ("coco", labels)):
            trial(FORMATS[name], root, BadFiles("error"), LeftOut(list))
            trial(FORMATS[name], root, BadFiles("skip"), LeftOut(list))
    assert trial.refused
    assert trial.taken

"""Replicas of CUHK03's three distributed forms, made of one set of pictures."""

import io
import pathlib
import re

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from mros_jax.data.datasets.cuhk03 import draw_trials
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.store import load_store

# (camera pair, person): images present of the ten; 1-5 are view 1, 6-10 view 2.
PEOPLE = {
    (1, 1): [1, 2, 6],
    (1, 2): [1, 6, 7],
    (1, 3): [2, 10],
    (2, 1): [3, 4, 8],
    (2, 2): [1, 9],
    (5, 1): [5, 6],
}
TEST_SETS = [[(1, 2), (2, 1)], [(1, 1), (5, 1)]]


def picture(pair, person, image, kind):
    """Pictures differ in size, as CUHK03's do."""
    seed = pair * 1000 + person * 100 + image * 2 + (kind == "labeled")
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (12 + seed % 5, 6 + seed % 3, 3), dtype=np.uint8)


def file_name(pair, person, image):
    return f"{pair}_{person:03d}_{1 if image <= 5 else 2}_{image:02d}.png"


ALL = [(pair, person, image) for (pair, person), images in PEOPLE.items() for image in images]


def write_mat(path):
    """A MATLAB 7.3 file stores arrays transposed, and cells as references."""
    with h5py.File(path, "w") as file:
        store = file.create_group("#refs#")

        def put(array):
            name = f"r{len(store)}"
            store[name] = np.ascontiguousarray(array.T)
            return store[name].ref

        def put_cells(cells):  # (rows, columns) of references
            name = f"r{len(store)}"
            data = store.create_dataset(name, (len(cells[0]), len(cells)), dtype=h5py.ref_dtype)
            for i, row in enumerate(cells):
                for j, reference in enumerate(row):
                    data[j, i] = reference
            return data.ref

        for kind in ("labeled", "detected"):
            pairs = file.create_dataset(kind, (1, 5), dtype=h5py.ref_dtype)
            for pair in range(1, 6):
                persons = max([p for q, p in PEOPLE if q == pair], default=1)
                cells = [
                    [
                        put(
                            picture(pair, person, image, kind)
                            if image in PEOPLE.get((pair, person), [])
                            else np.zeros((0, 0), np.uint64)  # an empty cell
                        )
                        for image in range(1, 11)
                    ]
                    for person in range(1, persons + 1)
                ]
                pairs[0, pair - 1] = put_cells(cells)
        sets = file.create_dataset("testsets", (1, len(TEST_SETS)), dtype=h5py.ref_dtype)
        for i, test_set in enumerate(TEST_SETS):
            sets[0, i] = put(np.array(test_set, np.float64))


NEW_PIDS = {pair_and_person: i for i, pair_and_person in enumerate(PEOPLE, 1)}
QUERY = [(2, 1, 3), (2, 2, 1), (5, 1, 5)]
GALLERY = [(2, 1, 4), (2, 1, 8), (2, 2, 9), (5, 1, 6)]


def write_config(path):
    index = {entry: i for i, entry in enumerate(ALL, 1)}
    train = [entry for entry in ALL if entry[0] == 1]
    column = lambda values: np.array(values)[:, None]  # noqa: E731
    scipy.io.savemat(
        path,
        {
            "filelist": np.array([[file_name(*entry)] for entry in ALL], dtype=object),
            "labels": column([NEW_PIDS[entry[:2]] for entry in ALL]).astype(np.uint16),
            "camId": column([1 if entry[2] <= 5 else 2 for entry in ALL]).astype(np.uint8),
            "train_idx": column([index[entry] for entry in train]).astype(np.uint16),
            "query_idx": column([index[entry] for entry in QUERY]).astype(np.uint16),
            "gallery_idx": column([index[entry] for entry in GALLERY]).astype(np.uint16),
        },
    )


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "cuhk03"
    (root / "cuhk03_release").mkdir(parents=True)
    write_mat(root / "cuhk03_release" / "cuhk-03.mat")
    for kind in ("labeled", "detected"):
        write_config(root / f"cuhk03_new_protocol_config_{kind}.mat")
    return root


def check_new(data, kind):
    np.testing.assert_array_equal(data.pid_of_label, [1, 2, 3])
    assert len(data.train) == 8
    np.testing.assert_array_equal(data.query.pids, [4, 5, 6])
    np.testing.assert_array_equal(data.query.camids, [1, 1, 1])
    np.testing.assert_array_equal(data.gallery.pids, [4, 4, 5, 6])
    np.testing.assert_array_equal(data.gallery.camids, [1, 2, 2, 2])
    for split, entries in ((data.query, QUERY), (data.gallery, GALLERY)):
        for i, entry in enumerate(entries):
            with Image.open(io.BytesIO(split.images.encoded(i))) as image:
                np.testing.assert_array_equal(np.asarray(image), picture(*entry, kind))


@pytest.mark.parametrize("kind", ["labeled", "detected"])
def test_new_protocol_from_mat(root, kind):
    data = load_dataset(f"cuhk03_{kind}", root)
    check_new(data, kind)
    store = load_store(data.train, height=16, width=8, num_threads=4, progress=False)
    assert store.images.shape == (8, 16, 8, 3)


@pytest.mark.parametrize("kind", ["labeled", "detected"])
def test_new_protocol_from_extracted_images(root, kind):
    (root / "cuhk03_release" / "cuhk-03.mat").unlink()
    (root / f"images_{kind}").mkdir()
    for entry in ALL:
        Image.fromarray(picture(*entry, kind)).save(root / f"images_{kind}" / file_name(*entry))
    check_new(load_dataset(f"cuhk03_{kind}", root), kind)


@pytest.mark.parametrize("kind", ["labeled", "detected"])
@pytest.mark.parametrize("inner", [".", "cuhk03-np"])
def test_new_protocol_from_image_folders(tmp_path, kind, inner):
    train = [entry for entry in ALL if entry[0] == 1]
    parts = {"bounding_box_train": train, "query": QUERY, "bounding_box_test": GALLERY}
    for part, entries in parts.items():
        folder = tmp_path / inner / kind / part
        folder.mkdir(parents=True)
        for pair, person, image in entries:
            pid, view = NEW_PIDS[pair, person], 1 if image <= 5 else 2
            Image.fromarray(picture(pair, person, image, kind)).save(
                folder / f"{pid:04d}_c{view}_{image}.png"
            )
    check_new(load_dataset(f"cuhk03_{kind}", tmp_path), kind)


def test_classic_protocol(root):
    data = load_dataset("cuhk03_labeled_classic", root)
    # Persons number through the pairs: 1-3 in pair 1, 4-5 in pair 2, 6 and 7 in 3 and 4, 8 in 5.
    np.testing.assert_array_equal(data.pid_of_label, [1, 3, 5, 8])
    np.testing.assert_array_equal(data.query.pids, [2, 4, 4])
    np.testing.assert_array_equal(data.query.camids, 1)
    np.testing.assert_array_equal(data.gallery.pids, [2, 2, 4])
    np.testing.assert_array_equal(data.gallery.camids, 2)
    with Image.open(io.BytesIO(data.gallery.images.encoded(1))) as image:
        np.testing.assert_array_equal(np.asarray(image), picture(1, 2, 7, "labeled"))
    other = load_dataset("cuhk03_labeled_classic", root, test_set=1)
    np.testing.assert_array_equal(np.unique(other.query.pids), [1, 8])
    assert not set(other.train.pids) & set(other.query.pids)
    with pytest.raises(ValueError, match=r"test_set must be in 0\.\.1, got 2"):
        load_dataset("cuhk03_detected_classic", root, test_set=2)


def test_single_shot_trials(root):
    gallery = load_dataset("cuhk03_labeled_classic", root).gallery  # pids 2, 2, 4
    trials = draw_trials(gallery, trials=400, rng=np.random.default_rng(0))
    assert trials.shape == (400, 2)
    np.testing.assert_array_equal(gallery.pids[trials], np.broadcast_to([2, 4], (400, 2)))
    first = np.bincount(trials[:, 0], minlength=2)
    assert abs(first[0] - 200) < 5 * 10
    again = draw_trials(gallery, trials=400, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(trials, again)


def test_documented_example(root):
    page = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
    (block,) = re.findall(r"```python\n([^`]*draw_trials[^`]*)```", page.read_text())
    rng = np.random.default_rng(0)
    features = {
        "query_features": rng.normal(size=(3, 4)).astype(np.float32),
        "gallery_features": rng.normal(size=(3, 4)).astype(np.float32),
    }
    namespace = {"PATH": root, **features}
    exec(block, namespace)
    assert 0 < namespace["rank1"] <= 1
    assert namespace["trials"].shape == (100, 2)


def test_without_h5py(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ValueError, match=r"pip install 'mros_jax\[cuhk03\]'"):
        load_dataset("cuhk03_labeled", root)

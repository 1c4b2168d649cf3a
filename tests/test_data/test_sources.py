import re

import numpy as np
import pytest

from mros_jax.data.datasets.records import DATASETS
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.images import EncodedImages
from mros_jax.data.splits import Dataset, Split, relabel


def test_market_layout(market):
    data = load_dataset("market1501", market.root)
    assert data.name == "market1501"
    assert data.num_classes == 2
    np.testing.assert_array_equal(data.pid_of_label, [2, 7])
    np.testing.assert_array_equal(data.train.labels, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(data.train.pids, [2, 2, 7, 7, 7])
    np.testing.assert_array_equal(data.train.camids, [1, 2, 2, 3, 3])
    np.testing.assert_array_equal(data.train.sequences, [1, 1, 3, 3, 3])
    assert data.query.names.tolist() == sorted(p.name for p in (market.root / "query").iterdir())
    np.testing.assert_array_equal(data.gallery.pids, [-1, 0, 1, 1, 3, 3])
    np.testing.assert_array_equal(data.gallery.junk, [True] + [False] * 5)
    np.testing.assert_array_equal(data.gallery.distractors, [False, True] + [False] * 4)
    assert data.query.labels is None
    assert data.gallery.labels is None
    path = market.root / "bounding_box_test" / "0001_c2s1_001976_01.jpg"
    assert data.gallery.images.encoded(3) == path.read_bytes()


def test_market_inside_its_archive_directory(market):
    market.root.rename(market.root.parent / "Market-1501-v15.09.15")
    data = load_dataset("market1501", market.root.parent)
    assert len(data.gallery) == 6


@pytest.mark.parametrize("folder", ["distractors_500k", "images"])
def test_market_distractors(market, folder):
    names = ["0000_c1s1_000151_01.jpg", "0000_c6s2_000001_02.jpg", "a_frame.jpg"]
    market.write(folder, *names)
    assert len(load_dataset("market1501", market.root).gallery) == 6
    gallery = load_dataset("market1501", market.root, distractors_500k=True).gallery
    assert gallery.names[6:].tolist() == [f"500k/{name}" for name in names]
    np.testing.assert_array_equal(gallery.pids[6:], 0)
    np.testing.assert_array_equal(gallery.camids[6:], [1, 6, 0])
    assert gallery.images.encoded(8) == (market.root / folder / "a_frame.jpg").read_bytes()


def test_market_distractors_missing(market):
    with pytest.raises(FileNotFoundError, match=r"distractors_500k\.zip"):
        load_dataset("market1501", market.root, distractors_500k=True)


def test_duke_layout(layout):
    layout.write("bounding_box_train", "0001_c2_f0046182.jpg", "0001_c8_f0046302.jpg")
    layout.write("query", "0005_c2_f0046985.jpg")
    layout.write("bounding_box_test", "0002_c1_f0044158.jpg", "0005_c5_f0051341.jpg")
    data = load_dataset("dukemtmc", layout.root)
    np.testing.assert_array_equal(data.train.camids, [2, 8])
    np.testing.assert_array_equal(data.train.sequences, [0, 0])
    np.testing.assert_array_equal(data.gallery.pids, [2, 5])


@pytest.mark.parametrize("version", [1, 2])
def test_msmt17_lists(layout, version):
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    lists = {
        "list_train.txt": (train, ["0000/0000_000_01_0303morning_0015_0.jpg 0"]),
        "list_val.txt": (train, ["0001/0001_000_14_0303noon_0008_0.jpg 1"]),
        "list_query.txt": (test, ["0000/0000_000_15_0113morning_1070_0.jpg 0"]),
        "list_gallery.txt": (
            test,
            ["0000/0000_001_03_0113noon_0005_1.jpg 0", "0001/0001_002_04_0113noon_0006_1.jpg 1"],
        ),
    }
    for name, (folder, lines) in lists.items():
        layout.write(folder, *(line.split()[0] for line in lines))
        (layout.root / name).write_text("\n".join(lines) + "\n")
    name = "msmt17" if version == 1 else "msmt17_v2"

    data = load_dataset(name, layout.root)
    np.testing.assert_array_equal(data.train.pids, [1, 2])
    np.testing.assert_array_equal(data.train.camids, [1, 14])
    # Test identity 0 is a person, neither a distractor nor training identity 0.
    np.testing.assert_array_equal(data.query.pids, [1042])
    np.testing.assert_array_equal(data.gallery.pids, [1042, 1043])
    np.testing.assert_array_equal(data.gallery.camids, [3, 4])
    path = layout.root / test / "0001/0001_002_04_0113noon_0006_1.jpg"
    assert data.gallery.images.encoded(1) == path.read_bytes()
    assert len(load_dataset(name, layout.root, include_val=False).train) == 1

    with pytest.raises(FileNotFoundError, match="without"):
        load_dataset("msmt17_v2" if version == 1 else "msmt17", layout.root)
    with open(layout.root / "list_query.txt", "a") as file:
        file.write("0000/nonsense.jpg 0\n")
    with pytest.raises(ValueError, match=r"list_query\.txt: 1 line .*line 2 .*nonsense"):
        load_dataset(name, layout.root)
    data = load_dataset(name, layout.root, on_bad_image="skip")
    assert len(data.query) == 1
    assert data.skipped[0].names == ("line 2 (0000/nonsense.jpg 0)",)


def test_folder_with_market_names(market):
    data = load_dataset("folder", market.root)
    assert [len(split) for split in data.splits] == [5, 3, 6]


CSV = """path,pid,camid,split
a/one.jpg,5,1,train
a/two.png,9,2,train
b/one.jpg,3,1,query
b/two.jpg,3,2,gallery
b/three.jpg,-1,2,gallery
"""


@pytest.mark.parametrize("by_file", [True, False])
def test_folder_with_csv(layout, by_file):
    layout.write("a", "one.jpg", "two.png")
    layout.write("b", "one.jpg", "two.jpg", "three.jpg")
    table = layout.root / ("people.csv" if by_file else "images.csv")
    table.write_text(CSV)
    data = load_dataset("folder", table if by_file else layout.root)
    np.testing.assert_array_equal(data.pid_of_label, [5, 9])
    assert data.gallery.names.tolist() == ["b/two.jpg", "b/three.jpg"]
    np.testing.assert_array_equal(data.gallery.pids, [3, -1])
    assert data.train.images.encoded(1) == (layout.root / "a/two.png").read_bytes()


@pytest.mark.parametrize(
    "row", ["b/x.jpg,me,1,query", "b/x.jpg,1,1,test", "b/x.jpg,1", "b/x.jpg,1,,query"]
)
def test_folder_with_wrong_csv_row(layout, row):
    layout.write("a", "one.jpg")
    (layout.root / "images.csv").write_text(CSV + row + "\n")
    with pytest.raises(ValueError, match=r"images\.csv: 1 row .*line 7.*on_bad_image='skip'"):
        load_dataset("folder", layout.root)
    data = load_dataset("folder", layout.root, on_bad_image="skip")
    assert len(data.query) == 1
    assert data.skipped[0].names == (f"line 7 ({row})",)


def test_folder_with_wrong_csv_header(layout):
    layout.write("a", "one.jpg")
    (layout.root / "images.csv").write_text("file,person\na,1\n")
    with pytest.raises(ValueError, match="column path, pid, camid, split missing; the header"):
        load_dataset("folder", layout.root)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"synthetic"}))
@pytest.mark.parametrize("root", [None, "nowhere", "."])
def test_missing_root_says_what_to_do(name, root, tmp_path):
    where = None if root is None else tmp_path / root
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, where)
    message = str(caught.value)
    assert DATASETS[name].source in message
    assert DATASETS[name].layout in message
    assert "'synthetic'" in message
    assert "--" not in message  # a library knows no flags
    if where is not None:
        assert str(where) in message


def test_unknown_option(market):
    with pytest.raises(ValueError, match=r"no option include_val .*; it has distractors_500k"):
        load_dataset("market1501", market.root, include_val=False)
    with pytest.raises(ValueError, match=r"'dukemtmc' has no option test_set .*; it has none"):
        load_dataset("dukemtmc", market.root, test_set=1)
    with pytest.raises(ValueError, match=r"'msmt17' has no option version .*; it has include_val"):
        load_dataset("msmt17", market.root, version=1)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown data set 'market'; there are .*market1501"):
        load_dataset("market")


@pytest.mark.parametrize(("folder", "split"), [("query", "query"), ("bounding_box_train", "train")])
def test_empty_split(market, folder, split):
    for path in (market.root / folder).iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=f"the {split} split is empty"):
        load_dataset("market1501", market.root)


def test_misnamed_file(market, messages):
    market.write("query", "person.jpg")
    (market.root / "query" / "notes.doc").write_text("?")
    with pytest.raises(ValueError, match=r"query: 2 files not named .*notes\.doc, person\.jpg"):
        load_dataset("market1501", market.root)
    data = load_dataset("market1501", market.root, on_bad_image="skip")
    assert len(data.query) == 3
    [skipped] = data.skipped
    assert skipped.names == ("notes.doc", "person.jpg")
    assert not skipped.harmless
    assert re.search(r"2 files .*person\.jpg. Skipped", messages[0])
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        load_dataset("market1501", market.root, on_bad_image="ignore")


def test_junk_does_not_train(market, messages):
    market.write("bounding_box_train", "-1_c1s1_000401_03.jpg", "0000_c1s1_000401_04.jpg")
    data = load_dataset("market1501", market.root)
    assert len(data.train) == 5
    assert "2 training images are junk or distractors" in messages[0]
    assert data.skipped[0].harmless


def test_synthetic_by_name():
    data = load_dataset("synthetic", preset="small")
    assert data.num_classes == 12
    assert data.options == {"preset": "small", "seed": 0}
    with pytest.raises(ValueError, match="takes no root"):
        load_dataset("synthetic", "/data")
    with pytest.raises(ValueError, match="option preset is 'huge'; expected one of market, demo"):
        load_dataset("synthetic", preset="huge")


def make_split(**changes) -> Split:
    columns = {name: np.arange(3, dtype=np.int64) for name in ("pids", "camids", "sequences")}
    images = EncodedImages(lambda row: bytes([row]), 3)
    fields = {"name": "train", "names": np.array(list("abc")), **columns, "images": images}
    return Split(**{**fields, **changes})


def test_split_checks_itself():
    with pytest.raises(ValueError, match=r"camids has shape \(2,\), names has \(3,\)"):
        make_split(camids=np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="2 images for 3 names"):
        make_split(images=EncodedImages(lambda row: b"", 2))


def test_select():
    split = make_split().select(np.array([2, 0]))
    assert split.names.tolist() == ["c", "a"]
    np.testing.assert_array_equal(split.pids, [2, 0])
    assert [split.images.encoded(i) for i in range(2)] == [b"\x02", b"\x00"]


def test_relabel_keeps_the_mapping():
    pids = np.array([30, 7, 30, 11], np.int32)
    labels, pid_of_label = relabel(pids)
    np.testing.assert_array_equal(labels, [2, 0, 2, 1])
    np.testing.assert_array_equal(pid_of_label[labels], pids)
    assert labels.dtype == np.int32
    assert pid_of_label.dtype == np.int64


def test_dataset_lists_its_splits():
    train = make_split(labels=np.arange(3, dtype=np.int32))
    query, gallery = make_split(name="query"), make_split(name="gallery")
    data = Dataset("x", train, query, gallery, pid_of_label=np.arange(3, dtype=np.int32))
    assert [split.name for split in data.splits] == ["train", "query", "gallery"]
    assert data.num_classes == 3


def test_distractors_beside_the_archive_directory(market):
    market.write("images", "0000_c1s1_000151_01.jpg")
    inner = market.root / "Market-1501-v15.09.15"
    inner.mkdir()
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (market.root / part).rename(inner / part)
    gallery = load_dataset("market1501", market.root, distractors_500k=True).gallery
    assert gallery.names[-1] == "500k/0000_c1s1_000151_01.jpg"

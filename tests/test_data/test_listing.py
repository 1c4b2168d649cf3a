"""One listing of images and one reader of text, for readers and programs alike."""

import os
import pathlib

import numpy as np
import pytest

from mros_jax import gallery
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.listing import list_images
from mros_jax.data.text import parse_whole, read_lines, read_table, read_text
from mros_jax.errors import NotFoundError, UserError

CASES = pathlib.Path(__file__).parents[1] / "data" / "cases"
CLUTTER = (
    "._0001_c1s1_000001_00.jpg",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "0001_c1s1_000001_00.jpg:Zone.Identifier",
    "0001_c1s1_000001_00.jpgZone.Identifier",
    "0001_c1s1_000001_00.jpg~",
    "@eaDir/0001_c1s1_000001_00.jpg/SYNO.jpg",
    "lost+found/a.jpg",
    "__MACOSX/a.jpg",
    "#recycle/a.jpg",
    "$RECYCLE.BIN/a.jpg",
    ".ipynb_checkpoints/a.jpg",
)


def test_clutter_is_passed_over_by_readers_and_by_extract(market):
    names = list_images(market.root / "query")
    before = gallery.list_images(market.root)
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        for name in CLUTTER:
            path = market.root / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image")
    assert list_images(market.root / "query") == names
    assert [len(split) for split in load_dataset("folder", market.root).splits] == [5, 3, 6]
    assert gallery.list_images(market.root) == before


def test_directories_below_and_links(layout):
    layout.write("a/b", "2.JPG", "1.png")
    layout.write("a", "z.tiff")
    (layout.root / "a" / "b" / "back").symlink_to(layout.root / "a")
    (layout.root / "a" / "nowhere.jpg").symlink_to(layout.root / "absent")
    (layout.root / "a" / "circle.jpg").symlink_to(layout.root / "a" / "circle.jpg")
    (layout.root / "a" / "notes.doc").write_text("?")
    images, others = list_images(layout.root, recursive=True)
    assert images == ["a/b/1.png", "a/b/2.JPG", "a/z.tiff"]
    assert others == ["a/circle.jpg", "a/notes.doc", "a/nowhere.jpg"]
    assert list_images(layout.root / "a") == (
        ["z.tiff"],
        ["b", "circle.jpg", "notes.doc", "nowhere.jpg"],
    )


def test_no_directory(tmp_path):
    with pytest.raises(NotFoundError, match="absent does not exist"):
        list_images(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; expected a directory"):
        list_images(tmp_path / "file")


def test_a_directory_that_may_not_be_read_is_named(market, monkeypatch):
    """Root may read anything, so the refusal is played."""
    real = os.scandir

    def refuse(path="."):
        if str(path).endswith("query"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError) as caught:
        load_dataset("folder", market.root)
    assert caught.value.filename.endswith("query")


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    text = end.join([mark + "path,pid,camid,split", "", '"a,ä.jpg", 5 ,1,train', "b\\c.jpg,2,1,x"])
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    rows = read_table(path, ("path", "pid"))
    assert [row.line for row in rows] == [3, 4]
    assert rows[0].fields == {"path": "a,ä.jpg", "pid": "5", "camid": "1", "split": "train"}
    assert [number for number, _ in read_lines(path)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("path\ncafé.jpg".encode("latin-1"), r"line 2: byte 0xe9 is not UTF-8"),
        (b"a\nb\0c", "line 2: a NUL character"),
        ("path,pid".encode("utf-16-le"), "line 1: a NUL character"),
        (b"\xff\xfea\0b", "is not UTF-16"),
        (b"\xff\xd8\xff\xe0 a picture", "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "list.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"list\.txt.*{message}.*UTF-8"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a header path,pid"),
        ("path\nx", "column pid missing; the header is path, expected path,pid"),
        ("path,pid,pid\n", "column pid is there more than once"),
        ('path,pid\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data"),
        ("path,pid\n" + "a" * 200_000 + ",1", "line 2: field larger than"),
    ],
)
def test_wrong_tables(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv", ("path", "pid"))


def test_missing_texts(tmp_path):
    with pytest.raises(NotFoundError, match=r"a\.txt does not exist"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a directory"):
        read_text(tmp_path)


def test_whole_numbers():
    largest = 2**63 - 1
    numbers = {"5": 5, " -1 ": -1, "+7": 7, "007": 7, "5.0": 5, "0" * 30 + "1": 1}
    for text, number in numbers.items():
        assert parse_whole(text) == number
    assert parse_whole(str(largest)) == largest
    assert parse_whole(str(-(2**63))) == -(2**63)
    for text in ("", "x", "1.5", "1e3", "1_000", "0x1", "٣", "nan", str(2**63), "9" * 5000, "1 2"):
        assert parse_whole(text) is None


def test_list_with_a_byte_order_mark(tmp_path):
    root, names = gallery.list_images(CASES / "list_bom.txt")
    assert root == CASES
    assert names == ["a.jpg", "b.jpg"]
    (tmp_path / "windows.txt").write_text("# chosen\nbelow\\a.jpg\n", encoding="utf-16")
    assert gallery.list_images(tmp_path / "windows.txt")[1] == ["below/a.jpg"]


def read_case(name, tmp_path):
    (tmp_path / "images.csv").write_bytes((CASES / name).read_bytes())
    return load_dataset("folder", tmp_path)


def test_table_in_utf_16(tmp_path):
    assert [len(split) for split in read_case("images_utf16.csv", tmp_path).splits] == [1, 1, 1]


def test_big_identities(tmp_path):
    data = read_case("images_big_pid.csv", tmp_path)
    assert data.train.pids.tolist() == data.pid_of_label.tolist() == [3_000_000_000]
    assert data.train.labels.tolist() == [0]
    assert data.train.labels.dtype == np.int32


def test_table_of_a_spreadsheet_on_windows(layout):
    layout.write("a", "1.jpg", "2.jpg", "3.jpg")
    layout.root.joinpath("images.csv").write_text(
        "path;pid;camid;split\r\na\\1.jpg;1.0;1;Train\r\na\\2.jpg;2;1;query\r\n"
        "a\\3.jpg;2;20240101123000;gallery\r\n"
    )
    data = load_dataset("folder", layout.root)
    assert data.train.names.tolist() == ["a/1.jpg"]
    assert data.gallery.camids.tolist() == [20240101123000]
    assert data.train.images.encoded(0)


@pytest.mark.parametrize(
    "row",
    [
        f"x.jpg,{2**63},1,train",
        f"x.jpg,1,{10**30},train",
        "x.jpg,-2,1,train",
        "x.jpg,1,2024-01-01,query",
    ],
)
def test_numbers_without_a_place_are_named_with_their_line(tmp_path, row):
    text = "path,pid,camid,split\na.jpg,1,1,train\n\n" + row + "\n"
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(UserError, match=rf"images\.csv: 1 row .*line 4 \({row}\)"):
        load_dataset("folder", tmp_path)


def test_numbers_in_file_names(market):
    market.write("query", "3000000000_c1s1_x.jpg", "0004_c20240101123000s9_x.jpg")
    data = load_dataset("market1501", market.root)
    assert 3_000_000_000 in data.query.pids
    assert 20240101123000 in data.query.camids
    market.write("query", f"{2**63}_c1s1_x.jpg")
    with pytest.raises(UserError, match=rf"{2**63}_c1s1_x\.jpg"):
        load_dataset("market1501", market.root)


def test_a_directory_for_each_person(layout):
    layout.write("train/ben", "c1_1.jpg", "c2_1.jpg")
    layout.write("train/anna", "cam1-2.jpg", "x_camera02_7.png", "deeper/0001_c3s2_1.jpg")
    layout.write("query/cleo", "C1.jpg")
    layout.write("gallery/cleo", "c12.jpg")
    layout.write("gallery/0", "c2_1.jpg")
    layout.write("gallery/-1", "c2_1.jpg")
    data = load_dataset("folder", layout.root)
    assert data.train.names.tolist() == [
        "anna/cam1-2.jpg", "anna/deeper/0001_c3s2_1.jpg", "anna/x_camera02_7.png",
        "ben/c1_1.jpg", "ben/c2_1.jpg",
    ]  # fmt: skip
    assert data.train.pids.tolist() == [1, 1, 1, 2, 2]
    assert data.train.camids.tolist() == [1, 3, 2, 1, 2]
    assert data.train.sequences.tolist() == [0, 2, 0, 0, 0]
    assert dict(zip(data.gallery.names, data.gallery.pids, strict=True)) == {
        "-1/c2_1.jpg": -1,
        "0/c2_1.jpg": 0,
        "cleo/c12.jpg": 3,
    }
    assert data.query.pids.tolist() == [3]
    layout.write("query/cleo", "nocamera.jpg")
    with pytest.raises(UserError, match=r"query: 1 file not like PERSON/c1_.*cleo/nocamera\.jpg"):
        load_dataset("folder", layout.root)


def test_directories_that_are_numbers_are_pids(layout):
    for part, pid in (("train", "0017"), ("query", "5"), ("gallery", "5")):
        layout.write(f"{part}/{pid}", "c1_1.jpg")
    data = load_dataset("folder", layout.root)
    assert data.pid_of_label.tolist() == [17]
    layout.write("gallery/-3", "c1_1.jpg")
    with pytest.raises(UserError, match="directory -3 is no identity"):
        load_dataset("folder", layout.root)

"""One's own data: what every format is read into, who is tested, and what is written."""

import collections
import csv
import json
import pathlib
import re

import numpy as np
import PIL.Image
import pytest

from mros_jax import console
from mros_jax.data import prepare
from mros_jax.data.datasets.layouts import BadFiles
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.decoding import read_image
from mros_jax.data.own import pictures
from mros_jax.data.own.drawing import cut_tracks, draw_splits
from mros_jax.data.own.preparation import FORMATS, options_of, prepare_own
from mros_jax.data.own.sightings import LeftOut, Sighting, number_names
from mros_jax.errors import UserError

HEIGHT, WIDTH = 64, 80  # of frames


def make_frames(count, seed=0):
    shape = (count, HEIGHT, WIDTH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(directory, frames, first=1):
    directory.mkdir(parents=True)
    for number, pixels in enumerate(frames, first):
        PIL.Image.fromarray(pixels).save(directory / f"{number:06d}.png")


def write_video(path, frames, codec="ffv1", pixel_format="bgr0"):
    """Without loss, so that frames can be told apart and compared."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixel_format
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.start_encoding()
        container.mux(stream.encode())


def write_tracks(path, people=4, frames=6, more=""):
    """Each person stands 16 x 32 pixels large in a column of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{frame},{person},{16 * person},{frame},16,32,1,-1,-1,-1"
        for frame in range(1, frames + 1)
        for person in range(people)
    ]
    path.write_text("\n".join([*lines, more]) + "\n")


def read(name, root, on_bad_image="error", **options):
    left_out, bad_files = LeftOut(list), BadFiles(on_bad_image)
    return FORMATS[name](pathlib.Path(root), bad_files, left_out, **options), left_out


def read_sources(out):
    with open(out / "sources.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def prepare_quietly(*args, **options):
    return prepare_own(*args, progress=False, **options)


# Tracks


def test_tracks_in_a_video(tmp_path):
    """Every crop has the pixels of its frame and box, and can be traced to its line."""
    frames = make_frames(8)
    write_video(tmp_path / "in" / "yard.mkv", frames)
    write_tracks(tmp_path / "in" / "yard.txt", frames=8)
    made = prepare_quietly(
        "mot", tmp_path / "in", tmp_path / "out", pseudo_cameras=2, every=2, image_format="png"
    )
    rows = read_sources(made.path)
    assert len(rows) == 4 * 4
    for row in rows:
        frame, left, top = (int(float(row[key])) for key in ("frame", "left", "top"))
        expected = frames[frame - 1, top : top + 32, left : left + 16]
        np.testing.assert_array_equal(read_image(made.path / row["image"]).pixels, expected)
        line = int(row["origin"].rpartition("line ")[2])
        text = (tmp_path / "in" / "yard.txt").read_text().splitlines()[line - 1]
        assert text.startswith(f"{frame},{row['identity']},{left},{top},")
    assert {int(row["frame"]) for row in rows} == {1, 3, 5, 7}
    assert {row["camera"] for row in rows} == {"yard, part 1 of 2", "yard, part 2 of 2"}
    assert sum("same view" in note for note in made.notes) == 1
    data = load_dataset("folder", made.path)
    assert (data.num_classes, len(data.query)) == (2, 4)
    files = {path.name for path in made.path.iterdir()}
    assert files == {
        *("bounding_box_train", "query", "bounding_box_test"),
        *("identities.csv", "cameras.csv", "sources.csv", "prepared.json"),
    }
    options = json.loads((made.path / "prepared.json").read_text())
    assert (options["format"], options["every"], options["seed"]) == ("mot", 2, 0)


def test_one_camera_is_no_task_unless_tracks_are_cut(tmp_path):
    write_images(tmp_path / "in" / "img1", make_frames(6))
    write_tracks(tmp_path / "in" / "gt" / "gt.txt")
    with pytest.raises(UserError, match=r"one camera \(in\).*\. With pseudo_cameras=2"):
        prepare_quietly("mot", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sequences_are_cameras(tmp_path):
    for name in ("cam-9", "cam-10"):
        write_images(tmp_path / name / "frames", make_frames(6), first=0)  # counted from 0
        write_tracks(tmp_path / name / "gt" / "gt.txt")
        (tmp_path / name / "seqinfo.ini").write_text(
            f"[Sequence]\nname={name}\nimDir=frames\nimWidth={WIDTH}\nimHeight={HEIGHT}\n"
        )
    own, _ = read("mot", tmp_path)
    assert len({seen.identity for seen in own}) == 8
    shared, _ = read("mot", tmp_path, shared_ids=True)
    assert {seen.identity for seen in shared} == set("0123")
    assert number_names(seen.camera for seen in shared) == {"cam-9": 1, "cam-10": 2}
    assert {(seen.frame, seen.file.name) for seen in own if seen.frame < 3} == {
        (1, "000000.png"),
        (2, "000001.png"),
    }
    numbered, _ = read("mot", tmp_path, camera_pattern=r"-(\d+)")
    assert {seen.camera for seen in numbered} == {"9", "10"}
    with pytest.raises(UserError, match=r"cam-9 is a sequence that camera_pattern 'x\(\.\)'"):
        read("mot", tmp_path, camera_pattern="x(.)")
    with pytest.raises(UserError, match=r"0 of 8 identities .* of 2 cameras.* by shared_ids"):
        prepare_quietly("mot", tmp_path, tmp_path / "out")
    (tmp_path / "cam-9" / "seqinfo.ini").write_text(
        "[Sequence]\nimDir=frames\nimWidth=1\nimHeight=1"
    )
    with pytest.raises(UserError, match=r"64 x 80 .*seqinfo\.ini says 1 x 1"):
        read("mot", tmp_path)
    (tmp_path / "cam-9" / "seqinfo.ini").write_text("[Sequence]\nname=cam-10\nimDir=frames")
    with pytest.raises(UserError, match=r"gt\.txt are both of a sequence cam-10"):
        read("mot", tmp_path)
    (tmp_path / "cam-9" / "seqinfo.ini").write_text("name=x")
    with pytest.raises(UserError, match=r"seqinfo\.ini is no description of a sequence"):
        read("mot", tmp_path)


def test_which_boxes_are_taken(tmp_path):
    write_images(tmp_path / "img1", make_frames(2))
    lines = {
        "1,1,0,0,9,9,0,1,1": "not to be considered",
        "1,2,0,0,9,9,1,7,1": "of class 7",
        "1,3,0,0,9,9,1,1,0.2": "of a visibility below 0.5",
        "1,4,0,0,9,9,0.3,1,1": "of a confidence below 0.4",
        "1,-1,0,0,9,9,1,1,1": "without identity",
        "2,1,0,0,9,9,1,1,1": "between the frames taken",
        "1,5,0,0,9,9,1,1,0.5": "",
        "1 6 0 0 9 9": "",  # blanks, and nothing known of it
        "1,7,0,0,9,9,-1,-1,-1,-1": "",
        "1,8,0,0,9,9,0.4,7,0.1,3": "",  # places in the world are neither class nor visibility
        "1.0000e+00,9.0,0,0,9,9": "",  # as numpy writes it
    }
    (tmp_path / "det").mkdir()
    (tmp_path / "det" / "det.txt").write_text("\n".join(lines))
    options = {"min_visibility": 0.5, "min_confidence": 0.4, "every": 2}
    taken, left_out = read("mot", tmp_path, **options)
    assert [seen.identity for seen in taken] == list("56789")
    for number, reason in enumerate(lines.values(), 1):
        if reason:
            (origins,) = [where for why, where in left_out.items() if why.startswith(reason)]
            assert origins == [f"{tmp_path}/det/det.txt, line {number}"]
    taken, _ = read("mot", tmp_path, classes=(1, 7))
    assert "2" in {seen.identity for seen in taken}


@pytest.mark.parametrize(
    "line",
    ["one,1,0,0,9,9", "1,1,0,0,9", "0,1,0,0,9,9", "1,1.5,0,0,9,9", "1,1,0,0,0,9", "1,1,nan,0,9,9"],
)
def test_wrong_line_of_tracks(tmp_path, line):
    write_images(tmp_path / "img1", make_frames(6))
    write_tracks(tmp_path / "gt" / "gt.txt", more=line)
    with pytest.raises(UserError, match=rf"gt\.txt: 1 line not like .*line 25 \({line}\)"):
        read("mot", tmp_path)
    taken, _ = read("mot", tmp_path, on_bad_image="skip")
    assert len(taken) == 24


def test_twice_in_a_frame(tmp_path):
    write_images(tmp_path / "img1", make_frames(6))
    write_tracks(tmp_path / "gt" / "gt.txt", more="2,1,0,0,9,9")
    with pytest.raises(UserError, match=r"of a frame and an id: .*line 25 \(as .*line 6\)"):
        read("mot", tmp_path)
    taken, _ = read("mot", tmp_path, on_bad_image="skip")
    assert len(taken) == 24


def test_tracks_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no directory; expected .*gt"):
        read("mot", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tracks; expected .*gt"):
        read("mot", tmp_path)
    write_tracks(tmp_path / "yard.txt")
    with pytest.raises(UserError, match=r"yard\.txt has no frames; expected .*yard\.mp4"):
        read("mot", tmp_path)
    write_images(tmp_path / "yard", make_frames(4))
    with pytest.raises(UserError, match="yard: 2 frames without an image: frame 5, frame 6"):
        read("mot", tmp_path)
    taken, _ = read("mot", tmp_path, on_bad_image="skip")
    assert len(taken) == 4 * 4
    for suffix in ("mp4", "AVI"):
        (tmp_path / f"yard.{suffix}").write_bytes(b"")
    with pytest.raises(UserError, match=r"yard\.txt has 2 videos beside it"):
        read("mot", tmp_path)
    for suffix in ("mp4", "AVI"):
        (tmp_path / f"yard.{suffix}").unlink()
    (tmp_path / "yard" / "cover.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cover\.png has no frame number"):
        read("mot", tmp_path)


def test_detections_have_no_identities(tmp_path):
    write_images(tmp_path / "in" / "img1", make_frames(1))
    (tmp_path / "in" / "det").mkdir()
    (tmp_path / "in" / "det" / "det.txt").write_text("1,-1,0,0,9,9,1\n1,-1,9,9,9,9,1\n")
    with pytest.raises(UserError, match=r"0 of 0 identities .*\n  left out: 2 without identity"):
        prepare_quietly("mot", tmp_path / "in", tmp_path / "out")


# Videos


def test_a_video_that_is_shorter_than_its_tracks(tmp_path):
    write_video(tmp_path / "in" / "yard.mkv", make_frames(4))
    write_tracks(tmp_path / "in" / "yard.txt")
    with pytest.raises(UserError, match=r"8 sightings that cannot.*frame 5; yard\.mkv has 4"):
        prepare_quietly("mot", tmp_path / "in", tmp_path / "out", pseudo_cameras=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    made = prepare_quietly(
        *("mot", tmp_path / "in", tmp_path / "out"), pseudo_cameras=2, on_bad_image="skip"
    )
    assert len(read_sources(made.path)) == 4 * 4
    assert any(note.startswith("skipped: pictures: 8 sightings") for note in made.notes)


def test_no_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "yard.mkv"
    path.write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"yard\.mkv: it cannot be decoded"):
        next(pictures.read_video(path))
    with av.open(str(path), "w") as container:  # sound alone
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match=r"yard\.mkv has no video in it"):
        next(pictures.read_video(path))
    write_video(tmp_path / "none.avi", make_frames(0))
    with pytest.raises(UserError, match=r"none\.avi is a video without frames"):
        next(pictures.read_video(tmp_path / "none.avi"))


def test_a_video_of_a_phone_is_turned_upright(tmp_path):
    """MP4 says by a matrix how it is to be shown: here a quarter turn clockwise."""
    path = tmp_path / "phone.mp4"
    grey = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    grey[:, : WIDTH // 2] = 255
    write_video(path, [grey], codec="mpeg4", pixel_format="yuv420p")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4")
    data[matrix : matrix + 36] = turned.tobytes()
    path.write_bytes(data)
    (upright,) = pictures.read_video(path)
    assert upright.shape == (WIDTH, HEIGHT, 3)
    expected = np.rot90(grey, -1)  # what was left is above
    assert np.abs(upright.astype(int) - expected).mean() < 8
    assert pictures.measure(path) == (WIDTH, HEIGHT)


# Boxes


def test_boxes_at_the_edge_and_beyond():
    pixels = make_frames(1)[0]
    np.testing.assert_array_equal(pictures.cut(pixels, (-3, 5, 10, 20)), pixels[5:25, :7])
    np.testing.assert_array_equal(pictures.cut(pixels, (75, 60, 10, 20)), pixels[60:, 75:])
    np.testing.assert_array_equal(pictures.cut(pixels, (0.6, 0.4, 2, 2)), pixels[:2, 1:3])
    for box in ((-20, 0, 10, 10), (0, HEIGHT, 10, 10), (WIDTH, 0, 1e12, 10), (0, -1e9, 5, 5)):
        assert pictures.cut(pixels, box).size == 0


def test_small_and_outside_boxes_are_left_out_and_named(tmp_path):
    write_images(tmp_path / "in" / "img1", make_frames(6))
    more = "1,10,200,0,16,32\n1,11,0,40,16,32\n1,12,0,0,16,32"
    write_tracks(tmp_path / "in" / "gt" / "gt.txt", more=more)
    made = prepare_quietly("mot", tmp_path / "in", tmp_path / "out", pseudo_cameras=2)
    text = "\n".join(made.notes)
    assert re.search(r"left out: 1 outside of the frame: .*line 25", text)
    assert re.search(r"left out: 1 of less than 32 x 16 pixels in the frame: .*line 26", text)
    assert "left out: 1 identities of fewer than 2 images: 12" in text  # a track of one box
    assert len(read_sources(made.path)) == 24


# Who is tested


def make_sightings(counts):
    """`counts[identity][camera]` images each."""
    return [
        Sighting(f"p{i}", f"c{j}", pathlib.Path(f"{i}-{j}-{k}.jpg"), k, None, f"{i}-{j}-{k}")
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        for k in range(count)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_drawn(seed):
    """Nobody trains and is tested; every query has a match in another camera."""
    counts = np.random.default_rng(seed).integers(0, 4, (12, 3))
    counts[:3] = 1  # so that enough can be tested
    sightings = make_sightings(counts)
    splits = draw_splits(sightings, seed=seed)
    assert splits == draw_splits(sightings, seed=seed)
    split_of = collections.defaultdict(set)
    places = collections.defaultdict(set)
    for seen, split in zip(sightings, splits, strict=True):
        split_of[seen.identity].add(split)
        places[seen.identity, split].add(seen.camera)
    for identity, kinds in split_of.items():
        assert kinds in ({"train"}, {"query", "gallery"}, {""}), identity
        assert (kinds == {""}) == (counts[int(identity[1:])].sum() == 1)
        for camera in places[identity, "query"]:
            assert places[identity, "gallery"] - {camera}
    tested = sum("query" in kinds for kinds in split_of.values())
    people = sum(kinds != {""} for kinds in split_of.values())
    several = ((counts > 0).sum(1) > 1).sum()
    assert tested == min(round(people / 2), several)
    assert any(draw_splits(sightings, seed=other) != splits for other in range(20, 25))


def test_queries_are_one_of_each_camera():
    sightings = make_sightings([[3, 3], [3, 3], [1, 1], [2, 1], [4, 0]])
    splits = draw_splits(sightings, test_fraction=0.9)
    pairs = zip(sightings, splits, strict=True)
    count = collections.Counter(seen.identity for seen, split in pairs if split == "query")
    full = {"p0": 2, "p1": 2, "p2": 1, "p3": 1}
    assert len(count) == 3
    assert count == {name: full[name] for name in count}


def test_too_few_to_split():
    with pytest.raises(UserError, match="3 of 4 identities have at least 2 images; expected 4"):
        draw_splits(make_sightings([[2, 2], [2, 2], [2, 2], [1, 0]]))
    with pytest.raises(UserError, match="1 of 4 identities were seen by two of 2 cameras"):
        draw_splits(make_sightings([[2, 2], [4, 0], [4, 0], [0, 4]]))


def test_tracks_are_cut_in_time():
    cut = cut_tracks(make_sightings([[5, 0], [1, 2]])[::-1], 2)
    parts = {(seen.identity, seen.camera[:2], seen.frame): seen.camera[9] for seen in cut}
    assert [parts["p0", "c0", frame] for frame in range(5)] == list("11122")
    assert [parts["p1", "c1", frame] for frame in range(2)] == list("12")


def test_numbers_of_names():
    assert number_names(["10", "2", "007"]) == {"2": 2, "007": 7, "10": 10}
    assert number_names(["0", "1"]) == {"0": 1, "1": 2}  # 0 would be a distractor
    assert number_names(["7", "007"]) == {"007": 1, "7": 2}
    assert number_names(["anna 10", "anna 9"]) == {"anna 9": 1, "anna 10": 2}


# Tables


def write_table(
    layout, people=("Änne", "Bo", "Cem", "Dee"), header="path,identity,camera", more=""
):
    rows = [header]
    for person in people:
        for camera in ("door", "gate"):
            for i in range(2):
                layout.write(camera, f"{person}{i}.jpg", height=40, width=20)
                rows.append(f"{camera}/{person}{i}.jpg,{person},{camera}")
    table = layout.root / "people.csv"
    table.write_text("\n".join(rows) + "\n" + more, encoding="utf-8")
    return table


def test_table_with_text_identities(layout, tmp_path):
    table = write_table(layout)
    made = prepare_quietly("csv", table, tmp_path / "out")
    assert (made.path / "cameras.csv").read_text() == "camid,camera\n1,door\n2,gate\n"
    names = (made.path / "identities.csv").read_text(encoding="utf-8")
    assert names == "pid,identity\n1,Bo\n2,Cem\n3,Dee\n4,Änne\n"
    rows = read_sources(made.path)
    for row in rows:  # whole images are copied as they are
        assert (made.path / row["image"]).read_bytes() == pathlib.Path(row["file"]).read_bytes()
        assert row["identity"] in row["file"]
        assert row["camera"] in row["file"]
    assert len(rows) == 16
    data = load_dataset("market1501", made.path)
    assert [len(split) for split in data.splits] == [8, 4, 4]


def test_table_with_boxes_and_splits(layout, tmp_path):
    layout.write("in", "group.png", height=HEIGHT, width=WIDTH)
    lines = ["path;identity;camera;split;left;top;width;height"]
    for place, (who, camera, split) in enumerate(
        [("a", "1", "train"), ("b", "1", "train"), ("c", "1", "query"), ("c", "2", "gallery")]
    ):
        lines.append(f"in\\group.png;{who};{camera};{split};{20 * place};0;20;40")
    table = layout.root / "boxes.csv"
    table.write_bytes("\r\n".join(lines).encode("utf-16"))
    made = prepare_quietly("csv", table, tmp_path / "out", image_format="png")
    pixels = read_image(layout.root / "in" / "group.png").pixels
    data = load_dataset("folder", made.path)
    np.testing.assert_array_equal(
        read_image(made.path / "query" / data.query.names[0]).pixels, pixels[:40, 40:60]
    )
    assert [len(split) for split in data.splits] == [2, 1, 1]
    table.write_text(table.read_text("utf-16").replace("c;2;gallery", "a;2;gallery"))
    with pytest.raises(UserError, match="1 identities are in train and in query or gallery: a;"):
        prepare_quietly("csv", table, tmp_path / "other")
    table.write_text(table.read_text().replace("a;2;gallery", "c;2;"))
    with pytest.raises(UserError, match=r"1 of 4 images have no split.*line 5"):
        prepare_quietly("csv", table, tmp_path / "other")
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="no image is of the split gallery"):
        prepare_quietly("csv", table, tmp_path / "other")


def test_table_of_a_video(tmp_path):
    frames = make_frames(4)
    write_video(tmp_path / "yard.mkv", frames)
    rows = [
        f"yard.mkv,{who},{camera},{frame}"
        for who, camera, frame in zip("abcdabcd", "11112222", "12341234", strict=True)
    ]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,identity,camera,frame", *rows]))
    with pytest.raises(
        UserError, match=r"4 repetitions of an image and a box.*line 6 \(as .*line 2\)"
    ):
        read("csv", table)
    table.write_text(
        "\n".join(
            ["path,identity,camera,frame,left,top,width,height"]
            + [f"{row},{20 * (i // 4)},0,20,40" for i, row in enumerate(rows)]
        )
    )
    made = prepare_quietly("csv", table, tmp_path / "out", image_format="png")
    for row in read_sources(made.path):
        left = int(float(row["left"]))
        expected = frames[int(row["frame"]) - 1][:40, left : left + 20]
        np.testing.assert_array_equal(read_image(made.path / row["image"]).pixels, expected)
    table.write_text("path,identity,camera\nyard.mkv,a,1\n")
    with pytest.raises(UserError, match=r"1 row without path.*a video needs one"):
        read("csv", table)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("door/Bo0.jpg,,door", r"1 row without path.*line 18 \(door/Bo0\.jpg,,door\)"),
        ("door/Bo0.jpg,Bo", "1 row without path.*line 18"),
        ("door/Bo0.jpg,Bo,door", r"1 repetition of an image and a box: .*18 \(as .*line 6\)"),
        ("door/no.jpg,Bo,door", r"pictures: 1 file not there: .*door/no\.jpg"),
    ],
)
def test_wrong_row(layout, row, message):
    table = write_table(layout, more=row + "\n")
    with pytest.raises(UserError, match=message):
        read("csv", table)
    taken, _ = read("csv", table, on_bad_image="skip")
    assert len(taken) == 16


def test_wrong_table(layout):
    table = write_table(layout)
    table.write_bytes(table.read_bytes() + "gate/x.jpg,Änne,gate".encode("latin-1"))
    with pytest.raises(UserError, match=r"people\.csv, line 18: byte 0xc4 is not UTF-8"):
        read("csv", table)
    with pytest.raises(UserError, match="column identity missing"):
        read("csv", write_table(layout, header="path,person,camera"))
    boxes = write_table(layout, header="path,identity,camera,left")
    with pytest.raises(UserError, match="16 rows without path"):
        read("csv", boxes)


def test_images_elsewhere(layout):
    table = write_table(layout)
    moved = layout.root.parent / "list.csv"
    table.rename(moved)
    taken, _ = read("csv", moved, images=str(layout.root))
    assert taken[0].file == layout.root / "door" / "Änne0.jpg"


# A directory for each identity


def test_directory_for_each_identity(layout, tmp_path):
    for person in ("ann", "bob", "cy", "di"):
        layout.write(person, "c1_0010.jpg", "c1_0009.jpg", "c2_0001.jpg", height=40, width=20)
    taken, _ = read("people", layout.root)
    assert [(s.identity, s.camera, s.file.name) for s in taken[:3]] == [
        ("ann", "1", "c1_0009.jpg"),
        ("ann", "1", "c1_0010.jpg"),
        ("ann", "2", "c2_0001.jpg"),
    ]
    assert load_dataset("folder", prepare_quietly("people", layout.root, tmp_path / "out").path)
    layout.write("eve/hall", "0001.jpg")
    taken, _ = read("people", layout.root)
    assert taken[-1].camera == "hall"
    layout.write("eve", "0001.jpg")
    layout.write(".", "loose.jpg")
    with pytest.raises(UserError, match=r"no image in an identity's directory: loose\.jpg"):
        read("people", layout.root)
    (layout.root / "loose.jpg").unlink()
    with pytest.raises(UserError, match=r"without a camera, which others have.*: eve/0001\.jpg"):
        read("people", layout.root)
    taken, _ = read("people", layout.root, camera_pattern=r"(\d)\.jpg")
    assert {seen.camera for seen in taken} == {"0", "1", "9"}
    with pytest.raises(UserError, match="camera_pattern 'x' has no group"):
        read("people", layout.root, camera_pattern="x")
    with pytest.raises(UserError, match=r"camera_pattern '\(' is no regular expression: missing"):
        read("people", layout.root, camera_pattern="(")


def test_identities_without_cameras(layout, tmp_path):
    for person in ("ann", "bob", "cy", "di"):
        layout.write(person, "front.jpg", "left.jpg", "rear.jpg", height=40, width=20)
    with pytest.raises(UserError, match="all images are of one camera"):
        prepare_quietly("people", layout.root, tmp_path / "out")
    made = prepare_quietly("people", layout.root, tmp_path / "out", pseudo_cameras=2)
    assert len(load_dataset("folder", made.path).query) == 2  # of the part with two images


# COCO


def write_coco(root, **changes):
    write_images(root / "images", make_frames(4))
    content = {
        "videos": [{"id": 1, "name": "door"}, {"id": 2, "name": "gate"}],
        "images": [
            {"id": i, "file_name": f"images/{i + 1:06d}.png", "video_id": 1 + i // 2}
            for i in range(4)
        ],
        "annotations": [
            {
                "id": 10 * i + p,
                "image_id": i,
                "bbox": [16 * p, 0, 16, 40],
                "category_id": 1,
                "track_id": p,
            }
            for i in range(4)
            for p in range(4)
        ],
        **changes,
    }
    (root / "labels.json").write_text(json.dumps(content))
    return root / "labels.json", content


def test_coco(tmp_path):
    labels, content = write_coco(tmp_path / "in")
    taken, _ = read("coco", labels)
    assert {seen.camera for seen in taken} == {"door", "gate"}
    assert len({seen.identity for seen in taken}) == 8
    made = prepare_quietly("coco", labels, tmp_path / "out", shared_ids=True)
    assert len(load_dataset("folder", made.path).query) == 4
    some, left_out = read("coco", labels, every=2)
    assert {seen.file.name for seen in some} == {"000001.png", "000003.png"}
    assert [len(where) for where in left_out.values()] == [8]

    for annotation in content["annotations"]:  # as CVAT writes it, and with no camera at all
        annotation["attributes"] = {"person": f"P{annotation.pop('track_id')}"}
    content["annotations"][0]["attributes"] = {}
    content["annotations"][1]["iscrowd"] = 1
    content["annotations"][2]["category_id"] = 3
    for image in content["images"]:
        del image["video_id"]
    labels.write_text(json.dumps(content))
    taken, left_out = read("coco", labels, identity_key="person", classes=(1,))
    assert {seen.camera for seen in taken} == {"1"}
    assert {seen.identity for seen in taken} == {"P0", "P1", "P2", "P3"}
    assert sorted(re.sub(r" \(.*", "", reason) for reason in left_out) == [
        "of a crowd",
        "of category 3",
        "without person",
    ]


def test_wrong_coco(tmp_path):
    labels, content = write_coco(tmp_path / "in")
    good = content["annotations"]

    def write(**changes):
        labels.write_text(json.dumps({**content, **changes}))

    wrong = {**good[0], "id": 99}
    for change in ({"image_id": 77}, {"image_id": [1]}, {"bbox": [0, 0, 0, 9]}, {"bbox": "x"}):
        write(annotations=[*good, {**wrong, **change}])
        with pytest.raises(UserError, match=r"json: 1 annotation without an .*: annotation 99\."):
            read("coco", labels)
        assert len(read("coco", labels, on_bad_image="skip")[0]) == 16
    write(annotations=[*good, wrong])
    with pytest.raises(UserError, match=r"of an image and an identity: .*99 \(as .*annotation 0\)"):
        read("coco", labels)
    write(images=[{"id": 0, "file_name": "images/000001.png"}, *content["images"][1:]])
    with pytest.raises(UserError, match="4 annotations without video_id, which others have"):
        read("coco", labels)
    write(images=[*content["images"], content["images"][0]])
    with pytest.raises(UserError, match="two images have the id 0"):
        read("coco", labels)
    write(videos=[{"id": 1, "name": "door"}, {"id": 2, "name": "door"}])  # no names to tell by
    assert {seen.camera for seen in read("coco", labels)[0]} == {"1", "2"}
    write(images=3)
    with pytest.raises(UserError, match="no list of objects named images"):
        read("coco", labels)
    labels.write_text("[]")
    with pytest.raises(UserError, match="is no object with images and annotations"):
        read("coco", labels)
    write()
    (tmp_path / "in" / "images" / "000001.png").unlink()
    with pytest.raises(UserError, match=r"pictures: 1 file not there: .*000001\.png"):
        read("coco", labels)


# What is written


def test_a_damaged_image_is_named_or_skipped(layout, tmp_path):
    table = write_table(layout)
    (layout.root / "door" / "Bo0.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"1 sighting that cannot be read: .*line 6 \(not an image"):
        prepare_quietly("csv", table, tmp_path / "out")
    made = prepare_quietly("csv", table, tmp_path / "out", on_bad_image="skip")
    assert len(read_sources(made.path)) == 15


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_images(tmp_path / "in" / "img1", make_frames(6))
    write_tracks(tmp_path / "in" / "gt" / "gt.txt")
    save, calls = PIL.Image.Image.save, []

    def interrupt(image, *args, **options):
        calls.append(image)
        if len(calls) > 10:
            raise KeyboardInterrupt
        save(image, *args, **options)

    monkeypatch.setattr(PIL.Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_quietly("mot", tmp_path / "in", tmp_path / "new" / "out", pseudo_cameras=2)
    assert len(calls) > 10
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_there_stays(layout, tmp_path):
    (tmp_path / "out").mkdir()
    table = write_table(layout)
    prepare_quietly("csv", table, tmp_path / "out")  # an empty one may be there
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="out is there already; remove it"):
        prepare_quietly("csv", table, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 2}, "format 'csv' has no option every; it is of mot, coco"),
        ({"fraction": 2}, "format 'csv' has no option fraction$"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0; expected a number between 0 and 1"),
        ({"pseudo_cameras": 1}, "pseudo_cameras is 1; expected 2 or more"),
        ({"image_format": "gif"}, "image_format is 'gif'; expected jpeg or png"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_wrong_option(layout, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare_quietly("csv", write_table(layout), tmp_path / "out", **options)
    with pytest.raises(UserError, match="unknown format 'yolo'; there are mot, coco, csv, people"):
        prepare_quietly("yolo", layout.root, tmp_path / "out")


# The command


def test_command(layout, tmp_path, capsys):
    table = write_table(layout)
    words = ["--format=csv", f"--root={table}", f"--out={tmp_path / 'out'}", "--seed=3"]
    assert console.run(prepare.main, words) == 0
    printed = capsys.readouterr().out
    assert "16 images of 4 identities and 2 cameras\nto train: 8 images of 2 identities" in printed
    assert "no errors" in printed.splitlines()[-1]
    assert console.run(prepare.main, words) == console.MISUSE
    assert "is there already" in capsys.readouterr().err
    assert console.run(prepare.main, [*words, "--test_set=3"]) == console.MISUSE
    assert "--test_set is an option of --dataset only" in capsys.readouterr().err
    words[0] = "--dataset=market1501"
    assert console.run(prepare.main, words) == console.MISUSE
    assert "--seed is an option of --format only" in capsys.readouterr().err


def test_command_says_what_the_doctor_finds(layout, tmp_path, capsys):
    table = write_table(layout)
    (layout.root / "gate" / "Bo0.jpg").write_bytes((layout.root / "door" / "Cem1.jpg").read_bytes())
    words = ["--format=csv", f"--root={table}", f"--out={tmp_path / 'out'}", "--seed=3"]
    code = console.run(prepare.main, words)
    printed = capsys.readouterr().out
    assert "identical images" in printed
    assert code == ("ERROR" in printed)


def test_the_command_has_every_option():
    offered = {name for name, *_ in prepare._OWN}
    own = {"pseudo_cameras", "test_fraction", "min_images", "seed", "min_height", "min_width"}
    assert offered == own | {"image_format"} | {o for name in FORMATS for o in options_of(name)}

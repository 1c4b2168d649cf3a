"""The index on disk: what it finds, and what is left of it whatever happens to its writers."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mros_jax import console, extract, index
from mros_jax.errors import NotFoundError, UserError
from mros_jax.gallery import Features, Index, segment
from mros_jax.inference import Embedder
from mros_jax.retrieval import ECN, compute_distances
from mros_jax.runs import lock
from tests.least import Pixels
from tests.training import ROOT

pytest.importorskip("faiss")

MODEL = {"checkpoint": "last-1-abc", "flip_test": False, "crops": "none"}


def draw(num, seed=0, size=16, first=0):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((num, size), np.float32)
    return Features(features, [f"{first + i}.jpg" for i in range(num)], MODEL)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gallery.index"


def names(path):
    return [record["name"] for record in Index(path)]


def snapshot(path):
    """Every file of an index but the lock, with its content."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {file.relative_to(path): file.read_bytes() for file in files}


def test_finds_what_the_exact_distances_say(path):
    gallery, queries = draw(300), draw(20, seed=1)
    found = Index.build(path, gallery).search(queries, 7)
    distances = compute_distances(queries.features, gallery.features)
    np.testing.assert_array_equal(found.rows, np.argsort(distances, axis=1)[:, :7])
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :7], atol=1e-6)
    assert found.names[3] == [gallery.names[row] for row in found.rows[3]]
    assert Index(path).search(queries, 7).names == found.names


def test_in_any_number_of_segments_and_without_what_was_removed(path, monkeypatch):
    """One after another, and in blocks smaller than a segment."""
    monkeypatch.setattr(segment, "BLOCK", 16)
    gallery, queries = draw(120), draw(5, seed=1)
    parts = [slice(0, 70), slice(70, 100), slice(100, 115), slice(115, 120)]
    made = Index.build(path, Features(gallery.features[:0], [], MODEL))
    for part in parts:
        made.add(Features(gallery.features[part], gallery.names[part], MODEL))
    assert len(list((path / "segments").iterdir())) == 4
    made.remove([*gallery.names[:35], gallery.names[117]])
    kept = np.r_[35:117, 118:120]
    assert len(made) == len(kept)
    found = made.search(queries, 1000)
    order = np.argsort(compute_distances(queries.features, gallery.features[kept]), axis=1)
    assert found.names == [[gallery.names[kept[i]] for i in row] for row in order]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_kinds(path, kind, monkeypatch):
    monkeypatch.setattr(segment, "_LEAST_APPROXIMATE", 1000)
    gallery, queries = draw(2000, size=96), draw(50, seed=1, size=96)
    made = Index.build(path, gallery, kind=kind, effort=1)
    exact = made.search(queries, 10, exact=True)
    np.testing.assert_array_equal(
        exact.rows,
        np.argsort(compute_distances(queries.features, gallery.features), axis=1)[:, :10],
    )
    recalls = [made.measure_recall(effort=effort) for effort in (1, 16, 4000)]
    assert recalls[0] < recalls[1] <= recalls[2]
    assert recalls[0] == made.measure_recall()
    assert recalls[2] > 0.99
    # What is removed is never found, and enough is found whatever the effort.
    made.remove([name for name, *_ in exact.names])
    found = Index(path).search(queries, 300)
    assert found.rows.shape == (50, 300)
    assert not {name for row in found.names for name in row} & {row[0] for row in exact.names}
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert all(len(set(row)) == 300 for row in found.rows.tolist())


def test_small_segments_of_approximate_kinds_are_exact(path):
    made = Index.build(path, draw(100), kind="hnsw")
    assert made.measure_recall() == 1
    assert not list(path.rglob("search.faiss"))


def test_empty_gallery_and_more_than_there_is(path):
    made = Index.build(path, Features(np.empty((0, 16), np.float32), [], MODEL))
    assert len(made) == 0
    assert made.search(draw(3), 5).names == [[], [], []]
    assert made.search(draw(3), 5, rerank=ECN()).names == [[], [], []]
    with pytest.raises(UserError, match="has 0 images; expected more than 10"):
        made.measure_recall()
    made.add(draw(2))
    assert made.search(draw(1), 5).names == [["0.jpg", "1.jpg"]]
    assert made.search(Features(draw(1).features[:0], [], MODEL), 5).rows.shape == (0, 2)
    made.remove(["0.jpg", "1.jpg"])
    assert len(Index(path)) == 0
    assert not list((path / "segments").iterdir())


def test_removal_and_adding_again(path):
    gallery = draw(50)
    made = Index.build(path, gallery)
    made.remove(["7.jpg"])
    assert "7.jpg" not in made
    assert "8.jpg" in made
    assert made.search(Features(gallery.features[7:8], ["q"], MODEL), 1).names != [["7.jpg"]]
    before = snapshot(path)
    with pytest.raises(UserError, match=r"7\.jpg, absent\.jpg are not in .*; nothing is removed"):
        made.remove(["8.jpg", "7.jpg", "absent.jpg"])
    assert snapshot(path) == before
    made.add(Features(gallery.features[7:8], ["7.jpg"], MODEL))
    assert made.search(Features(gallery.features[7:8], ["q"], MODEL), 1).names == [["7.jpg"]]
    # Marks first; where more than half of a segment has them it is written again.
    assert len(made._now.segments[0].vectors) == 50
    made.remove(gallery.names[10:40])
    assert sum(len(part.vectors) for part in made._now.segments) == len(made) == 20
    assert sorted(names(path)) == sorted(gallery.names[:10] + gallery.names[40:])


def test_names_that_repeat(path):
    gallery = draw(20)
    with pytest.raises(UserError, match=r"3\.jpg is there more than once"):
        Index.build(path, Features(gallery.features[:2], ["3.jpg", "3.jpg"], MODEL))
    made = Index.build(path, gallery)
    other = draw(8, seed=5, first=18)
    before = snapshot(path)
    with pytest.raises(UserError, match=r"18\.jpg, 19\.jpg are already in"):
        made.add(other)
    assert snapshot(path) == before
    made.add(other, replace=True)
    assert sorted(names(path)) == sorted({*gallery.names, *other.names})
    assert made.search(other, 1).names == [[name] for name in other.names]
    assert np.abs(made.search(other, 1).distances).max() < 1e-6


def test_growing_leaves_alone_what_is_there(path):
    made, most, written = Index.build(path, draw(64)), 0, 0
    known = set(path.rglob("vectors.npy"))
    for i in range(40):
        made.add(draw(1, seed=i, first=100 + i))
        files = set(path.rglob("vectors.npy"))
        written += sum(len(np.load(file, mmap_mode="r")) for file in files - known)
        known, most = files, max(most, len(files))
    assert (path / "segments" / "000001" / "vectors.npy") in known  # never written again
    assert most <= 1 + np.log2(40)
    assert written <= 40 * np.log2(80)
    assert names(path) == draw(64).names + [f"{100 + i}.jpg" for i in range(40)]


def test_what_is_open_stays_as_it_was(path):
    reader = Index.build(path, draw(10))
    found = reader.search(draw(2), 3)
    writer = Index(path)
    writer.add(draw(30, seed=1, first=10))  # the first segment becomes part of the new one
    assert not (path / "segments" / "000001").exists()
    assert len(reader) == 10
    assert found.names == reader.search(draw(2), 3).names
    reader.refresh()
    assert len(reader) == 40


def test_ecn_on_a_shortlist_is_that_of_the_set(path):
    gallery, queries = draw(200), draw(4, seed=1)
    made = Index.build(path, gallery)
    method = ECN(k=10)
    found = made.search(queries, 6, rerank=method, shortlist=30)
    near = made.search(queries, 30)
    for i in range(4):
        chosen = near.rows[i]
        distances = method.distances(queries.features[i : i + 1], gallery.features[chosen])[0]
        order = np.argsort(distances, kind="stable")[:6]
        np.testing.assert_array_equal(found.rows[i], chosen[order])
        np.testing.assert_allclose(found.distances[i], distances[order])
    assert not np.array_equal(found.rows, near.rows[:, :6])
    named = made.search(queries, 6, rerank="ecn", shortlist=30)
    np.testing.assert_array_equal(
        named.rows, made.search(queries, 6, rerank=ECN(), shortlist=30).rows
    )
    with pytest.raises(UserError, match="top is 31, but there are only 30 images in the shortlist"):
        made.search(queries, 31, rerank=method, shortlist=30)
    with pytest.raises(UserError, match="unit length, and gsrw compares them as they are"):
        made.search(queries, 5, rerank="gsrw")


def test_metadata(path):
    gallery = draw(3)
    metadata: list[dict[str, Any]] = [{"pid": 7, "camid": 1}, {}, {"note": "grün", "box": [1, 2]}]
    described = Features(gallery.features, gallery.names, MODEL, "/data", metadata)
    made = Index.build(path, described)
    expected = [
        {"name": name, "root": "/data", **own}
        for name, own in zip(gallery.names, metadata, strict=True)
    ]
    assert list(made) == expected
    assert made.search(gallery, 1).records == [[record] for record in expected]
    for bad, told in (
        ([{"name": "x"}, {}, {}], r"metadata of 0\.jpg has name"),
        ([{}, {"x": {1}}, {}], r"metadata of 1\.jpg cannot be kept as JSON"),
        ([{}], "3 names and metadata of 1 images"),
    ):
        fresh = draw(3, first=10)
        with pytest.raises(UserError, match=told.replace("0", "10").replace(r"1\.", r"11\.")):
            made.add(Features(fresh.features, fresh.names, MODEL, "", bad))
    assert list(Index(path)) == expected


@pytest.mark.usefixtures("unchecked")
def test_descriptors_that_do_not_fit(path):
    made = Index.build(path, draw(5))
    before = snapshot(path)
    other = Features(draw(2, first=9).features, ["a", "b"], MODEL | {"checkpoint": "best-3-xyz"})
    for refused in (made.add, made.search):
        with pytest.raises(UserError, match=r"last-1-abc.*best-3-xyz.*cannot be compared"):
            refused(other)
    broken = draw(3, first=9)
    broken.features[1, 2], broken.features[2] = np.nan, 0
    with pytest.raises(UserError, match=r"10\.jpg, 11\.jpg hold NaN, infinity or only zeros"):
        made.add(broken)
    with pytest.raises(UserError, match=r"shape \(2, 8\) .* expected \(2, 16\)"):
        made.add(draw(2, size=8, first=9))
    with pytest.raises(UserError, match="effort is of the kinds ivf and hnsw"):
        made.search(draw(1), effort=3)
    with pytest.raises(UserError, match="top is 0"):
        made.search(draw(1), 0)
    assert snapshot(path) == before
    with pytest.raises(UserError, match="the name 3 of an image is no text"):
        Features(draw(1).features, [3], MODEL)  # type: ignore[list-item]
    with pytest.raises(UserError, match="kind is 'tree'; expected one of"):
        Index.build(path.with_name("other"), draw(2), kind="tree")


def test_a_place_that_is_taken(path):
    with pytest.raises(NotFoundError, match="is no index"):
        Index(path)
    path.mkdir()
    (path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds photo\.jpg"):
        Index.build(path, draw(2))
    assert (path / "photo.jpg").exists()
    (path / "photo.jpg").unlink()
    own = path / "segments" / "of a film"
    own.mkdir(parents=True)
    with pytest.raises(UserError, match="holds segments/of a film"):
        Index.build(path, draw(2))
    own.rmdir()
    (path / "segments" / "000001").mkdir()  # what a writer leaves that is killed
    Index.build(path, draw(2))
    with pytest.raises(UserError, match="is an index already"):
        Index.build(path, draw(2))


def test_an_index_of_another_version(path):
    Index.build(path, draw(2))
    manifest = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="of format 99, this version reads 1"):
        Index(path)


def test_a_damaged_index(path, monkeypatch):
    monkeypatch.setattr(segment, "_LEAST_APPROXIMATE", 100)
    made = Index.build(path, draw(200), kind="ivf")
    made.remove(["3.jpg"])
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) == 6
    for file in files:
        whole = file.read_bytes()
        for size in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            if file.name == "index.json" and size == len(whole) - 1:
                continue  # its last newline
            with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
                Index(path)
        file.unlink()
        with pytest.raises(UserError, match=r"is damaged|is no index"):
            Index(path)
        file.write_bytes(whole)
    for key, value in {
        "parts": [{"name": "../x", "files": {}}],
        "model": 3,
        "size": 0,
        "effort": 0,
        "kind": "tree",
        "surplus": 1,
    }.items():
        manifest = json.loads((path / "index.json").read_text())
        (path / "index.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            Index(path)
        (path / "index.json").write_text(json.dumps(manifest))
    assert len(Index(path)) == 199


def test_two_writers_at_once(path):
    made = Index.build(path, draw(10))
    with lock.hold(path / ".lock"):
        for write in (lambda: made.add(draw(1, first=90)), lambda: made.remove(["1.jpg"])):
            with pytest.raises(UserError, match=f"in use by another process: {os.getpid()} on"):
                write()
        assert made.search(draw(1), 1).names == [["0.jpg"]]  # readers need no lock
    assert names(path) == draw(10).names


def test_writers_in_turns_lose_nothing(path):
    Index.build(path, draw(0))
    refused = []

    def add(first):
        own = Index(path)
        for i in range(first, first + 10):
            while f"{i}.jpg" not in own:
                try:
                    own.add(draw(1, seed=i, first=i))
                except UserError as error:
                    refused.append(str(error))

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("in use by another process" in told for told in refused)
    expected = {f"{first + i}.jpg" for first in (0, 100, 200) for i in range(10)}
    assert sorted(names(path)) == sorted(expected)


class Interrupt(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("task", ["build", "add", "remove"])
def test_a_write_that_fails_anywhere_changes_nothing(path, task, monkeypatch):
    """At each synchronization of a file, and at the renaming that publishes."""
    more, steps = draw(12, seed=1, first=50), 0

    def write():
        if task == "build":
            Index.build(path, draw(10))
        elif task == "add":
            Index(path).add(more)
        else:
            Index(path).remove(draw(6).names)

    if task != "build":
        Index.build(path, draw(10))
    before = snapshot(path) if path.exists() else {}
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        for fail_at in range(20):
            calls = 0

            def fail(*arguments, fail_at=fail_at, original=original):
                nonlocal calls
                calls += 1
                if calls > fail_at:
                    raise Interrupt
                return original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                try:
                    write()
                except Interrupt:
                    steps += 1
                    assert snapshot(path) == before
                    continue
            break
        after = snapshot(path)
        assert after != before
        shutil.rmtree(path)
        if task != "build":
            Index.build(path, draw(10))
    assert steps >= 4


_KILLED = """
import os, signal, sys
import numpy as np
from mros_jax.gallery import Features, Index, index, segment
path, where = sys.argv[1:]
def kill(*arguments): os.kill(os.getpid(), signal.SIGKILL)
places = {"write": (segment, "_sync"), "publish": (os, "replace"), "after": (index, "_clean")}
module, name = places[where]
made = Index(path)
if where == "after":
    original, calls = index._clean, []
    def kill(place):
        calls.append(place)
        if len(calls) > 1: os.kill(os.getpid(), signal.SIGKILL)
        original(place)
setattr(module, name, kill)
new = Features(np.eye(16, dtype=np.float32)[:12], [f"new{i}" for i in range(12)], dict(made.model))
made.add(new, replace=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["write", "publish", "after"])
def test_a_writer_that_is_killed(path, where):
    Index.build(path, draw(10))
    before = snapshot(path)
    command = [sys.executable, "-c", _KILLED, str(path), where]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = snapshot(path)
    assert set(left) > set(before) if where != "after" else set(left) & set(before)
    assert (path / ".lock").exists()
    new = [f"new{i}" for i in range(12)]
    expected = draw(10).names + (new if where == "after" else [])
    assert names(path) == expected
    # The next writer is not locked out, and removes what was left behind.
    Index(path).add(draw(1, first=70))
    assert names(path) == [*expected, "70.jpg"]
    manifest = json.loads((path / "index.json").read_text())
    assert {p.name for p in (path / "segments").iterdir()} == {p["name"] for p in manifest["parts"]}
    assert sorted(p.name for p in path.iterdir()) == ["index.json", "segments"]


# The command.


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 5, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def model(monkeypatch):
    """A model of a run, without one."""
    made = Embedder(Pixels(), {}, height=6, width=4, checkpoint_id="last-1-abc")
    for program in (index, extract):
        monkeypatch.setattr(program, "load_model", lambda run, checkpoint: made)
    return made


def command(*words):
    return console.run(index.main, [str(word) for word in words])


@pytest.mark.usefixtures("model")
def test_command(path, photos, tmp_path, capsys):
    first = tmp_path / "first.txt"
    first.write_text("".join(f"photos/{i}.png\n" for i in range(8)))
    assert command("build", path, "--run=r", f"--images={first}") == 0
    assert capsys.readouterr().out == f"{path}: 8 images\n"

    saved = tmp_path / "features.npz"
    assert extract.main(["--run=r", f"--images={photos}", f"--out={saved}"]) == 0
    capsys.readouterr()
    assert command("add", path, f"--features={saved}") == 0  # other names: another root
    assert capsys.readouterr().out == f"{path}: 20 images\n"
    assert command("add", path, f"--features={saved}") == 2
    assert "are already in" in capsys.readouterr().err
    assert command("add", path, f"--features={saved}", "--replace") == 0
    assert command("remove", path, *(f"photos/{i}.png" for i in range(7))) == 0
    listed = tmp_path / "gone.txt"
    listed.write_text("photos/7.png\n")
    assert command("remove", path, "--list", listed) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 12 images"

    out = tmp_path / "found.json"
    words = ("search", path, "--run=r", f"--images={photos / '3.png'}", "--top=2", f"--out={out}")
    assert command(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3.png"
    assert lines[1].split() == ["1", "0.0000", "3.png"]
    assert len(lines) == 3
    [written] = json.loads(out.read_text())
    assert written["query"] == "3.png"
    assert [found["name"] for found in written["found"]] == ["3.png", lines[2].split()[2]]
    assert pathlib.Path(written["found"][0]["root"]) == photos
    # ECN of the whole gallery: its nearest first, too.
    assert command("search", path, f"--features={saved}", "--top=1", "--rerank=aqe") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1::2]] == lines[::2]


@pytest.mark.usefixtures("model")
def test_command_keeps_metadata(path, photos, tmp_path, capsys):
    table, out = tmp_path / "table.csv", tmp_path / "found.json"
    rows = [f"{i}.png,{i // 2},c{i}" for i in range(11)]
    table.write_text("name;person;camera\n" + "\n".join(rows).replace(",", ";") + "\n")
    words = ("build", path, "--run=r", f"--images={photos}", f"--metadata={table}")
    assert command(*words) == 2
    assert "table.csv has no row of 1 of 12 images, such as 11.png" in capsys.readouterr().err
    with table.open("a") as file:
        file.write("11.png;5\n")
    assert command(*words) == 2
    assert "line 13 has not the header's columns: 11.png;5" in capsys.readouterr().err
    (photos / "11.png").unlink()
    table.write_text(table.read_text().replace("11.png;5\n", "absent.png;9;c9\n"))
    assert command(*words) == 0
    query = photos / "6.png"
    assert command("search", path, "--run=r", f"--images={query}", f"--out={out}", "--top=1") == 0
    [found] = json.loads(out.read_text())[0]["found"]
    assert (found["name"], found["person"], found["camera"]) == ("6.png", "3", "c6")


@pytest.mark.usefixtures("model")
def test_command_tells_the_recall(path, photos, capsys, monkeypatch):
    monkeypatch.setattr(segment, "_LEAST_APPROXIMATE", 10)
    words = ("build", path, "--run=r", f"--images={photos}", "--kind=hnsw", "--effort=200")
    assert command(*words) == 0
    assert "recall of the 10 nearest, on a sample of its images: 1.000" in capsys.readouterr().out


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "absent", "--features=x.npz"), "absent is no index"),
        (("search", "{index}", "--features=absent.npz"), "absent.npz does not exist"),
        (("search", "{index}", "--images={photos}"), "--images need --run"),
        (("search", "{index}", "--images={photos}", "--run=r"), "cannot be compared"),
        (("remove", "{index}"), "nothing to remove"),
        (("build", "{index}", "--images={photos}", "--run=r"), "is an index already"),
        (("search", "{index}", "--images={photos}", "--run=r", "--out=absent/x"), "absent"),
        (("search", "{index}", "--features=x.npz", "--effort=0"), "--effort: 0 is below 1"),
        (("build", "new", "--features=absent.npz", "--effort=3"), "an exact search has none"),
    ],
)
def test_command_refuses(path, photos, words, told, capsys):
    Index.build(path, Features(draw(2, size=72).features, ["a", "b"], {"checkpoint": "other"}))
    assert command(*(word.format(index=path, photos=photos) for word in words)) == 2
    assert told in capsys.readouterr().err


def test_digests_that_collide(path, monkeypatch):
    """A name is never taken for another of the same digest."""
    monkeypatch.setattr(segment, "make_digests", lambda names: np.zeros(len(names), np.uint64))
    made = Index.build(path, draw(5))
    assert "3.jpg" in made
    assert "9.jpg" not in made
    made.add(draw(3, seed=1, first=5))
    made.remove(["3.jpg", "6.jpg"])
    assert names(path) == [f"{i}.jpg" for i in (0, 1, 2, 4, 5, 7)]

"""Descriptors of anybody's images, by command and from Python."""

import json
import pathlib
import re
import shutil
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mros_jax import console, extract, gallery
from mros_jax.data import decoding
from mros_jax.errors import UserError
from mros_jax.inference import Embedder, load_model
from tests.runs import copy_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    return copy_run(tmp_path_factory.mktemp("runs") / "small", cache_dir)


@pytest.fixture(scope="module")
def model(run):
    return load_model(run)


@pytest.fixture(scope="module")
def images():
    """Ten images of four sizes, smooth enough to survive JPEG."""
    rng = np.random.default_rng(0)
    sizes = [(128, 64), (90, 40), (96, 32), (300, 120)]
    noise = [rng.integers(0, 256, (6, 3, 3)).astype(np.uint8) for _ in range(10)]
    return [
        np.asarray(Image.fromarray(n).resize(sizes[i % 4][::-1], Image.Resampling.BICUBIC))
        for i, n in enumerate(noise)
    ]


@pytest.fixture
def folder(images, tmp_path):
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for i, image in enumerate(images):
        name = f"below/{i}.JPG" if i % 2 else f"{i}.png"
        Image.fromarray(image).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_files_are_decoded_while_the_network_is_busy(model, folder, monkeypatch):
    paths = sorted(folder.rglob("*.*g"), key=str)
    expected = model.embed(paths, batch_size=4)
    read = threading.Event()
    load, embed, loaded = model._load, model._embed, []

    def load_and_tell(images):
        loaded.append(images)
        if len(loaded) == 2:
            read.set()
        return load(images)

    def wait_and_embed(*given):
        assert read.wait(60)
        return embed(*given)

    monkeypatch.setattr(model, "_load", load_and_tell)
    monkeypatch.setattr(model, "_embed", wait_and_embed)
    np.testing.assert_allclose(model.embed(paths, batch_size=4), expected, rtol=1e-6)


def test_lists_images_of_a_directory_and_those_below(folder):
    root, names = gallery.list_images(folder)
    assert root == folder
    expected = [f"{i}.png" for i in range(0, 10, 2)] + [f"below/{i}.JPG" for i in range(1, 10, 2)]
    assert names == sorted(expected)


def test_reads_lists_in_their_order(folder):
    listed = folder / "list.txt"
    listed.write_text("# chosen\n8.png\n\nbelow/1.JPG\n0.png\n")
    assert gallery.list_images(listed) == (folder, ["8.png", "below/1.JPG", "0.png"])


def test_refuses_what_holds_no_images(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="neither a directory"):
        gallery.list_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no images.*\.jpg"):
        gallery.list_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="is an image"):
        gallery.list_images(folder / "0.png")


def test_embeds_arrays_of_any_size_and_files_alike(model, images, tmp_path):
    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(files[-1])
    features = model.embed(images)
    assert features.shape == (10, model.descriptor_sizes["descriptor"])
    assert features.dtype == np.float32
    np.testing.assert_array_equal(model.embed(files), features)
    np.testing.assert_array_equal(model.embed([str(f) for f in files]), features)
    np.testing.assert_array_equal(model.embed([files[0], *images[1:]]), features)
    outputs = model.outputs([files[0], *images[1:]])
    np.testing.assert_allclose(outputs.descriptor, features, rtol=1e-4, atol=1e-5)
    # Each is resized for itself, as PIL does: across, then down.
    kind = Image.Resampling.BILINEAR
    across = [Image.fromarray(image).resize((32, len(image)), kind) for image in images]
    resized = [image.resize((32, 96), kind) for image in across]
    np.testing.assert_array_equal(model.embed(np.stack([np.asarray(i) for i in resized])), features)
    same_size = np.stack([images[0], images[4], images[8]])
    np.testing.assert_allclose(model.embed(same_size), features[[0, 4, 8]], rtol=0.1, atol=0.02)


def test_ten_crops_are_the_mean_of_ten_embeddings(model):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 104, 40, 3), dtype=np.uint8)
    ten = Embedder(model.network, model.variables, height=104, width=40, crop=(96, 32))
    made = []
    for side in (images, images[:, :, ::-1]):
        for y, x in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4)):
            made.append(model.embed(np.ascontiguousarray(side[:, y : y + 96, x : x + 32])))
    expected = np.mean(made, axis=0)
    np.testing.assert_allclose(ten.embed(images, crops="ten"), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(made[0] - expected).max() > 1e-2
    constant = np.full((1, 30, 20, 3), 90, np.uint8)
    one = model.embed(constant)
    np.testing.assert_allclose(ten.embed(constant, crops="ten"), one, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="ten crops have mirror images already"):
        ten.embed(images, crops="ten", flip_test=True)
    with pytest.raises(UserError, match="crops is 'five'; expected one of none, ten"):
        ten.embed(images, crops="five")


def test_embed_refuses_bad_input(model, images, tmp_path):
    with pytest.raises(ValueError, match="image 1 is float32"):
        model.embed([images[0], images[0].astype(np.float32)])
    with pytest.raises(ValueError, match=r"2 images cannot be read: .*a\.jpg.*b\.jpg"):
        model.embed([tmp_path / "a.jpg", images[0], tmp_path / "b.jpg"])
    with pytest.raises(ValueError, match=r"got one: a\.jpg"):
        model.embed("a.jpg")


def _extract(run, *args):
    return console.run(extract.main, ["--run", str(run), *map(str, args)])


def test_command_writes_descriptors_and_finds_an_image_again(
    run, model, images, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        gallery.features, "_BATCH", 4
    )  # several batches, and a last one that is shorter
    out, drawn = tmp_path / "features.npz", tmp_path / "found.png"
    args = ("--out", out, "--search", folder / "6.png", "--top", 3, "--draw", drawn)
    assert _extract(run, "--images", folder, *args) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["1", printed[1].split()[1], "6.png"]
    assert abs(float(printed[1].split()[1])) < 1e-4
    assert len(printed) == 5
    with Image.open(drawn) as picture:
        assert picture.width > 300

    with np.load(out) as file:
        assert set(file.files) == {"names", "features", "root", "checkpoint", "flip_test", "crops"}
        names, features = file["names"].tolist(), file["features"]
        assert str(file["checkpoint"]) == model.checkpoint_id
    assert names == gallery.list_images(folder)[1]
    even = [names.index(f"{i}.png") for i in range(0, 10, 2)]
    np.testing.assert_allclose(features[even], model.embed(images[::2]), rtol=1e-4, atol=1e-5)

    # The same search in what is on disk.
    again = ("--search", folder / "6.png", "--top", 3, "--draw", drawn)
    assert _extract(run, "--features", out, *again) == 0
    assert capsys.readouterr().out.splitlines() == printed[1:]


def test_names_every_bad_image(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery.features, "_BATCH", 4)
    (folder / "0.png").write_bytes(b"not a picture")
    whole = (folder / "below" / "9.JPG").read_bytes()
    (folder / "below" / "9.JPG").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "features.npz"
    assert _extract(run, "--images", folder, "--out", out) == 2
    error = capsys.readouterr().err
    assert "2 of 10 images cannot be read" in error
    assert "0.png" in error
    assert "below/9.JPG" in error
    assert not out.exists()

    assert _extract(run, "--images", folder, "--out", out, "--on_bad_image", "skip") == 0
    error = capsys.readouterr().err
    assert "left out: 0.png" in error
    assert "left out: below/9.JPG" in error
    with np.load(out) as file:
        assert len(file["names"]) == len(file["features"]) == 8
        assert not {"0.png", "below/9.JPG"} & set(file["names"].tolist())


def test_skipping_must_leave_something(model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 images"):
        gallery.features.extract(model.embed, tmp_path, ["a.jpg"], on_bad_image="skip")


def test_refuses_descriptors_of_another_checkpoint(run, folder, tmp_path, capsys):
    other = tmp_path / "other.npz"
    arrays: dict[str, Any] = {"names": ["a"], "features": np.ones((1, 4)), "root": "."}
    arrays |= {"checkpoint": "best-1-abc", "flip_test": False, "crops": "none"}
    np.savez(other, **arrays)
    assert _extract(run, "--features", other, "--search", folder / "0.png") == 2
    assert "cannot be compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to do"),
        (("--search", "absent.jpg"), "absent.jpg cannot be read"),
        (("--search", "absent.jpg", "--top", "0"), "--top: 0 is below 1"),
    ],
)
def test_command_refuses_early(run, folder, args, message, capsys):
    assert _extract(run, "--images", folder, *args) == 2
    assert message in capsys.readouterr().err


def test_search_orders_equals_by_index():
    features = np.array([[0, 1], [1, 0], [1, 0], [1, 1]], np.float32)
    order, distances = extract.search(np.array([1, 0], np.float32), features, 10)
    assert order.tolist() == [1, 2, 3, 0]
    np.testing.assert_allclose(distances, [0, 0, 1 - np.sqrt(0.5), 1], atol=1e-6)


def test_draws_although_an_image_is_gone(folder, tmp_path):
    out = tmp_path / "found.png"
    found = [(folder / "2.png", 0.1), (pathlib.Path("absent.png"), 0.2)]
    extract.draw_search(folder / "0.png", found, out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    assert [p.name for p in tmp_path.glob("*found*")] == ["found.png"]


def test_decodes_files_to_one_size(folder, images):
    loaded = decoding.load_images([folder / "0.png", folder / "2.png"], height=128, width=64)
    assert loaded.shape == (2, 128, 64, 3)
    np.testing.assert_array_equal(loaded[0], images[0])


def test_a_checkpoint_of_another_system_is_refused(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["network"] = {"name": "pcb", "trunk": "tiny", "reduced": 8}
    (other / "config.json").write_text(json.dumps(config))
    argv = ["--run", str(other), "--images", str(other), "--out", str(tmp_path / "f.npz")]
    (other / "a.png").write_bytes(b"")
    assert console.run(extract.main, argv) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: the checkpoint 'last' of .* is of another network than its config's pcb: missing "
        r"batch_stats/\S+ .*unexpected batch_stats/neck_t3/mean \(5, 64\).* more",
        told,
    )
    assert not (tmp_path / "f.npz").exists()

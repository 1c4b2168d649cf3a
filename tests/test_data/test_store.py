import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mros_jax import parallel
from mros_jax.data import cache
from mros_jax.data.augment import augment_batch, example_keys
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.decoding import decode_image
from mros_jax.data.images import EncodedImages
from mros_jax.data.prefetch import prefetch
from mros_jax.data.splits import Split
from mros_jax.data.store import load_store, place

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_split(*images: bytes, name: str = "train", **changes) -> Split:
    count = len(images)
    numbers = np.arange(count, dtype=np.int64)
    fields = {
        "name": name,
        "names": np.array([f"{i:04}.jpg" for i in range(count)]),
        "pids": numbers + 1,
        "camids": numbers,
        "sequences": numbers,
        "labels": numbers.astype(np.int32),
        "images": EncodedImages(lambda row: images[row], count),
    }
    return Split(**{**fields, **changes})


@pytest.fixture
def load(tmp_path):
    def load(split, **options):
        defaults = {"height": 20, "width": 10, "cache_dir": tmp_path / "kept", "progress": False}
        return load_store(split, **{**defaults, **options})

    return load


def is_mapped(store):
    return isinstance(store.images, np.memmap)


@pytest.fixture
def jpegs(encode, random_pixels):
    return [encode(random_pixels(i)) for i in range(5)]


def test_common_size_stays_native(market, load):
    split = load_dataset("market1501", market.root).train
    store = load(split)
    assert store.images.shape == (5, 16, 8, 3)
    for i in range(5):
        with Image.open(market.root / "bounding_box_train" / split.names[i]) as image:
            np.testing.assert_array_equal(store.images[i], np.asarray(image))
    assert store.split is split
    np.testing.assert_array_equal(store.labels, split.labels)


def test_different_sizes_are_resized_as_pil_does(load, encode, random_pixels):
    pixels = [random_pixels(0, 16, 8), random_pixels(1, 40, 30), random_pixels(2, 16, 8)]
    split = make_split(*[encode(image, "png") for image in pixels])
    store = load(split)
    assert store.images.shape == (3, 20, 10, 3)
    for ours, image in zip(store.images, pixels, strict=True):
        across = Image.fromarray(image).resize((10, len(image)), Image.Resampling.BILINEAR)
        expected = across.resize((10, 20), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(ours, expected)
    # Another common size is another file.
    assert load(split, height=24).images.shape == (3, 24, 10, 3)
    assert load(split).images.filename == store.images.filename


def test_rendered_images(load, monkeypatch):
    split = load_dataset("synthetic", preset="small").query.select(np.arange(3))
    first = load(split)
    assert first.images.shape == (3, 128, 64, 3)
    monkeypatch.setattr("mros_jax.data.synthetic.rendering.render", lambda *args, **kw: 1 / 0)
    np.testing.assert_array_equal(load(split).images, first.images)
    with pytest.raises(ZeroDivisionError):
        load(load_dataset("synthetic", preset="small", seed=1).query.select(np.arange(3)))


def test_second_time_comes_memory_mapped_from_the_cache(load, jpegs, monkeypatch):
    split = make_split(*jpegs)
    first = load(split)
    monkeypatch.setattr("mros_jax.data.images.decode_image", lambda data: 1 / 0)
    second = load(split)
    assert isinstance(second.images, np.memmap)
    assert not second.images.flags.writeable
    np.testing.assert_array_equal(first.images, second.images)
    assert second.images.filename == first.images.filename


def test_cache_is_keyed_by_content(load, jpegs, encode, random_pixels):
    key = lambda *images, **changes: load(make_split(*images, **changes)).images.filename  # noqa: E731
    original = key(*jpegs)
    renamed = np.array([f"other{i}.jpg" for i in range(5)])
    assert key(*jpegs, names=renamed) == original
    assert key(*jpegs[::-1]) != original
    assert key(*jpegs[:4]) != original
    assert key(*jpegs[:4], encode(random_pixels(99))) != original


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_of_other_sizes_are_resized_as_asked_for(load, encode, random_pixels, interpolation):
    pixels = [random_pixels(0), np.ascontiguousarray(random_pixels(1)[:-1])]
    split = make_split(*(encode(image, "png") for image in pixels))
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[interpolation]
    load(split, height=9, width=5, interpolation=other)  # is not taken for it
    store = load(split, height=9, width=5, interpolation=interpolation)
    kind = Image.Resampling[interpolation.upper()]
    across = [Image.fromarray(image).resize((5, len(image)), kind) for image in pixels]
    expected = [image.resize((5, 9), kind) for image in across]
    np.testing.assert_array_equal(store.images, np.stack([np.asarray(x) for x in expected]))


def test_default_cache_is_the_users(jpegs, tmp_path, monkeypatch):
    store = load_store(make_split(*jpegs), height=4, width=4, progress=False)
    assert isinstance(store.images, np.memmap)
    used = pathlib.Path(str(store.images.filename))
    assert used.parent == tmp_path / "cache-home" / "mros_jax" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "mros_jax" / "images"


def test_without_cache(load, jpegs, tmp_path):
    assert not is_mapped(load(make_split(*jpegs), use_cache=False))
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "no description"])
def test_damaged_cache_is_noticed_and_made_again(load, jpegs, damage, messages):
    split = make_split(*jpegs)
    first = load(split)
    expected = np.array(first.images)
    path = pathlib.Path(first.images.filename)
    if damage == "no description":
        path.with_suffix(".json").unlink()
        assert np.array_equal(load(split).images, expected)
    else:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:200] if damage == "truncate" else b"garbage" * 100)
        assert np.array_equal(load(split).images, expected)
        assert "cannot be used" in messages[0]
    assert isinstance(load(split).images, np.memmap)


def test_read_only_cache(load, jpegs, tmp_path, monkeypatch, messages):
    # Root may write anywhere, so the refusal is played; a real one is in the test below.
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "kept"))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    store = load(make_split(*jpegs))
    assert re.search(r"cannot be kept in .*kept.*Permission denied.*in memory", messages[0])
    assert not is_mapped(store)
    assert store.images.shape == (5, 16, 8, 3)


def test_cache_path_that_is_a_file(load, jpegs, tmp_path, messages):
    (tmp_path / "kept").write_text("in the way")
    assert not is_mapped(load(make_split(*jpegs)))
    assert "going on with them in memory" in messages[0]


@pytest.mark.parametrize("when", ["before", "while"])
def test_full_disk(load, jpegs, tmp_path, monkeypatch, when, messages):
    if when == "before":
        full = os.statvfs_result((4096, 4096, 100, 0, 0, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: full)
        pattern = "0.0 MB needed, 0.0 MB free"
    else:

        def fail(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        pattern = "No space left on device"
    assert not is_mapped(load(make_split(*jpegs)))
    assert pattern in messages[0]
    assert not [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".json"]
    monkeypatch.undo()
    assert is_mapped(load(make_split(*jpegs), cache_dir=tmp_path / "kept"))


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_device(jpegs, load, tmp_path, monkeypatch, messages):
    """The kernel's own ENOSPC, through /dev/full."""
    real = open

    def to_full(path, mode="r", *args, **kwargs):
        return real("/dev/full" if mode == "wb" else path, mode, *args, **kwargs)

    monkeypatch.setattr(cache, "open", to_full, raising=False)
    assert not is_mapped(load(make_split(*jpegs)))
    assert "No space left on device" in messages[0]


WRITER = """
import os, signal, sys
import numpy as np
from mros_jax import parallel
from mros_jax.data import cache
real = os.replace
def replace(source, target):
    if str(target).endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
import pathlib
images = np.arange(5 * 16 * 8 * 3, dtype=np.uint32).astype(np.uint8).reshape(5, 16, 8, 3)
cache.save(pathlib.Path(sys.argv[1]) / "x.npy", cache.Decoding(images, True, {}, {}))
"""


@pytest.mark.parametrize("moment", [".json", ".npy"])
def test_killed_writer_leaves_nothing_that_is_read(tmp_path, moment):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), moment],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.tmp"))
    assert cache.load(tmp_path / "x.npy", 5) is None
    images = np.zeros((2, 3, 4, 3), np.uint8)
    cache.save(tmp_path / "x.npy", cache.Decoding(images, True, {}, {}))
    found = cache.load(tmp_path / "x.npy", 2)
    assert found is not None
    np.testing.assert_array_equal(found.images, images)


def test_a_cache_of_other_images_is_not_taken(load, jpegs, messages):
    ours, theirs = load(make_split(*jpegs)), load(make_split(*jpegs[::-1]))
    mine, others = (pathlib.Path(store.images.filename) for store in (ours, theirs))
    expected = np.array(ours.images)
    for suffix in (".npy", ".json"):
        mine.with_suffix(suffix).write_bytes(others.with_suffix(suffix).read_bytes())
    np.testing.assert_array_equal(load(make_split(*jpegs)).images, expected)
    assert "belongs to other images" in messages[0]


def test_another_decoder_decodes_again(load, jpegs, monkeypatch):
    before = load(make_split(*jpegs)).images.filename
    monkeypatch.setattr("mros_jax.data.decoding.VERSION", 999)
    assert load(make_split(*jpegs)).images.filename != before


def test_what_killed_writers_leave_is_removed_a_day_later(tmp_path):
    old, new = tmp_path / "a.npy.1.tmp", tmp_path / "b.npy.2.tmp"
    for path in (old, new):
        path.write_bytes(b"?")
    os.utime(old, (0, 0))
    cache.save(tmp_path / "x.npy", cache.Decoding(np.zeros((1, 1, 1, 3), np.uint8), True, {}, {}))
    assert not old.exists()
    assert new.exists()


def test_two_writers_at_once(load, jpegs):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(load(make_split(*jpegs)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({store.images.filename for store in results}) == 1
    for store in results:
        np.testing.assert_array_equal(store.images, results[0].images)


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "missing"])
def test_bad_image(load, jpegs, kind, messages):
    images: list[Any] = list(jpegs)
    images[3] = {"truncated": jpegs[3][: len(jpegs[3]) // 2], "text": b"hello", "empty": b""}.get(
        kind
    )

    def read(i):
        if images[i] is None:
            raise FileNotFoundError(f"no such file: {i}")
        return images[i]

    split = make_split(*jpegs, images=EncodedImages(read, 5))
    for _ in range(2):  # decoded, then from the cache
        with pytest.raises(ValueError, match=r"1 file cannot be decoded: 0003\.jpg \(.*'skip'"):
            load(split)
    for _ in range(2):
        store = load(split, on_bad_image="skip")
        assert re.search(r"1 file cannot be decoded: 0003\.jpg .*Skipped", messages[-1])
        assert list(store.skipped) == ["0003.jpg"]
        np.testing.assert_array_equal(store.labels, [0, 1, 2, 4])
        assert store.split.names.tolist() == ["0000.jpg", "0001.jpg", "0002.jpg", "0004.jpg"]
        assert len(store) == 4
        np.testing.assert_array_equal(store.images[3], decode_image(jpegs[4]).pixels)


def test_bad_first_image_does_not_decide_the_size(load, jpegs, encode, random_pixels):
    large = encode(random_pixels(9, 40, 30))
    store = load(make_split(large[: len(large) // 2], *jpegs), on_bad_image="skip")
    assert store.images.shape == (5, 16, 8, 3)


def test_no_image_left(load):
    with pytest.raises(ValueError, match="none of 2 images can be decoded"):
        load(make_split(b"x", b"y"), on_bad_image="skip")


def test_wrong_options(load, jpegs):
    with pytest.raises(ValueError, match="on_bad_image must be 'error' or 'skip', got 'ignore'"):
        load(make_split(*jpegs), on_bad_image="ignore")
    with pytest.raises(ValueError, match="0 x 10 pixels"):
        load(make_split(*jpegs), height=0)


def test_converted_images_are_named_and_counted(load, jpegs, encode, random_pixels, messages):
    grey = encode(random_pixels(0)[..., 0], "png")
    for _ in range(2):  # decoded, then from the cache
        store = load(make_split(jpegs[0], grey, grey))
        assert store.changed == {"0001.jpg": ("L to RGB",), "0002.jpg": ("L to RGB",)}
        assert "converted: 2 x L to RGB" in messages[-1]


def test_device_and_host_give_the_same_batches(load, jpegs):
    store = load(make_split(*jpegs))
    plan = np.random.default_rng(0).integers(0, 5, (6, 4)).astype(np.int32)
    device, host = (place(store, fraction=f, replicate=parallel.replicate) for f in (1, 0))
    assert (device.kind, host.kind) == ("device", "host")
    assert host.data is None
    assert "in host memory" in host.reason
    assert "on the devices" in device.reason
    assert device.data is not None
    assert len(device.data["images"].sharding.device_set) == jax.local_device_count()

    @jax.jit
    def look_up(data, batch):
        return data["images"][batch["indices"]], data["labels"][batch["indices"]]

    augment = jax.jit(lambda x, k: augment_batch(x, k, height=32, width=16))
    pairs = zip(
        device.batches(plan, jax.device_put), host.batches(plan, jax.device_put), strict=True
    )
    for step, (one, other) in enumerate(pairs):
        images, labels = look_up(device.data, one)
        np.testing.assert_array_equal(images, other["images"])
        np.testing.assert_array_equal(labels, other["labels"])
        keys = example_keys(0, step, np.arange(4))
        np.testing.assert_array_equal(augment(images, keys), augment(other["images"], keys))


@pytest.mark.parametrize(
    ("platform", "stats", "kind"),
    [
        ("gpu", {"bytes_limit": 2 * 5 * 16 * 8 * 3}, "device"),
        ("gpu", {"bytes_limit": 2 * 5 * 16 * 8 * 3 - 1}, "host"),
        ("gpu", {"bytes_in_use": 0}, "host"),
        ("gpu", None, "host"),
        ("cpu", None, "device"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_a_device_tells_of_its_memory(load, jpegs, monkeypatch, platform, stats, kind):
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    placed = place(load(make_split(*jpegs)), fraction=0.5, replicate=lambda data: data)
    assert placed.kind == kind


def test_place_errors(load, jpegs):
    store = load(make_split(*jpegs))
    with pytest.raises(ValueError, match=r"1\.5; it must be in 0\.\.1"):
        place(store, fraction=1.5, replicate=parallel.replicate)
    query = make_split(*jpegs, name="query", labels=None)
    with pytest.raises(ValueError, match="query split has no training labels"):
        place(load(query), replicate=parallel.replicate)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_prefetch_keeps_order_and_runs_ahead(num_threads):
    second = threading.Event()

    def make(i):
        if i == 1:
            second.set()
        return i * i

    items = prefetch(range(50), make, depth=3, num_threads=num_threads)
    assert next(items) == 0
    assert second.wait(10)  # made without being asked for
    assert list(items) == [i * i for i in range(1, 50)]


def test_prefetch_is_bounded():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    ahead = prefetch(items(), abs, depth=3)
    next(ahead)
    assert taken == [0, 1, 2, 3]
    ahead.close()


def test_prefetch_passes_errors_on():
    def make(i):
        if i == 3:
            raise RuntimeError("batch 3")
        return i

    batches = prefetch(range(9), make)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="batch 3"):
        next(batches)


def test_prefetch_ends_its_thread_when_closed():
    before = threading.active_count()
    batches = prefetch(iter(int, 1), lambda i: i, depth=2)  # endless
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="depth is 0"):
        prefetch([], abs, depth=0)

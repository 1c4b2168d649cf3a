"""simplejpeg gives what Pillow gives, or leaves the file to Pillow."""

import io
import types

import numpy as np
import PIL.Image
import pytest

from mros_jax.data import jpeg
from mros_jax.data.decoding import UnreadableImageError, decode_image

simplejpeg = pytest.importorskip("simplejpeg")
LARGE = 10**8


def make_picture(height=67, width=35, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (9, 5, 3), np.uint8)
    return PIL.Image.fromarray(levels).resize((width, height), PIL.Image.Resampling.BICUBIC)


def encode(picture, **options):
    data = io.BytesIO()
    picture.save(data, "JPEG", **options)
    return data.getvalue()


def read_by_pillow(data):
    with PIL.Image.open(io.BytesIO(data)) as file:
        return np.asarray(file)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(128, 64), (67, 35), (1, 1)])
def test_pixels_are_pillows(subsampling, progressive, size):
    data = encode(make_picture(*size), subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(jpeg.decode_plain(data, LARGE), read_by_pillow(data))


def turned():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encode(make_picture(), exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(turned(), id="turned"),
        pytest.param(encode(make_picture().convert("L")), id="grey"),
        pytest.param(encode(make_picture().convert("CMYK")), id="cmyk"),
        pytest.param(encode(make_picture())[:-20], id="truncated"),
        pytest.param(b"\xff\xd8 and no more", id="damaged"),
        pytest.param(b"", id="empty"),
    ],
)
def test_the_rest_is_left_to_pillow(data):
    assert jpeg.decode_plain(data, LARGE) is None


def test_large_images_are_left_to_pillow():
    data = encode(make_picture())
    assert jpeg.decode_plain(data, 67 * 35 - 1) is None
    assert jpeg.decode_plain(data, 67 * 35) is not None


def test_damage_is_never_read_in_another_way():
    """Of a thousand damaged files those that are taken look as Pillow has them."""
    rng = np.random.default_rng(0)
    whole = [encode(make_picture(seed=i), quality=70, progressive=i % 2 == 1) for i in range(4)]
    taken = 0
    for i in range(1000):
        data = bytearray(whole[i % 4])
        for place in rng.integers(len(data), size=1 + i % 3):
            data[place] = rng.integers(256)
        pixels = jpeg.decode_plain(bytes(data), LARGE)
        if pixels is not None:
            taken += 1
            np.testing.assert_array_equal(pixels, decode_image(bytes(data)).pixels)
    assert 100 < taken < 900


def test_errors_are_those_of_pillow():
    with pytest.raises(UnreadableImageError, match=r"x\.jpg cannot be read: .*truncated"):
        decode_image(encode(make_picture())[:-20], "x.jpg")


@pytest.fixture
def another_library(monkeypatch):
    """A decoder whose pixels are a level off, as another JPEG library's may be."""

    def decode_jpeg(data, colors, **options):
        return simplejpeg.decode_jpeg(data, colors, **options) ^ 1

    def find(name):
        return types.SimpleNamespace(
            decode_jpeg=decode_jpeg, decode_jpeg_header=simplejpeg.decode_jpeg_header
        )

    monkeypatch.setattr("importlib.import_module", find)
    jpeg.find_decoder.cache_clear()
    yield
    jpeg.find_decoder.cache_clear()


def test_other_pixels_are_not_taken(another_library):
    data = encode(make_picture())
    assert jpeg.decode_plain(data, LARGE) is None
    np.testing.assert_array_equal(decode_image(data).pixels, read_by_pillow(data))

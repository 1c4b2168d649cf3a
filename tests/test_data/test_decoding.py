"""Every kind of image file comes out as upright 8-bit RGB, or is refused by its name."""

import io
import pathlib
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mros_jax.data import decoding
from mros_jax.data.decoding import UnreadableImageError, decode_image
from mros_jax.data.store import load_store
from mros_jax.errors import UserError
from tests.test_data.test_store import make_split

CASES = pathlib.Path(__file__).parents[1] / "data" / "cases"


def encode(image, format="png", **options):
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def grey(random_pixels):
    return random_pixels(0)[..., 0]


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, -1)


def check(data, pixels, *changes):
    decoded = decode_image(data, "x")
    np.testing.assert_array_equal(decoded.pixels, pixels)
    assert decoded.changes == changes


def test_exif_orientation_of_a_phone():
    with PIL.Image.open(CASES / "exif_orientation_6.jpg") as image:
        expected = np.rot90(np.asarray(image), -1)
    data = (CASES / "exif_orientation_6.jpg").read_bytes()
    check(data, expected, "turned upright (EXIF orientation 6)")
    store = load_store(make_split(data), height=9, width=9, use_cache=False, progress=False)
    np.testing.assert_array_equal(store.images[0], expected)
    read = decoding.load_images([CASES / "exif_orientation_6.jpg"], height=128, width=64)
    np.testing.assert_array_equal(read[0], expected)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["png", "tiff", "tiff_lzw", "webp"])
def test_all_orientations_in_all_formats(random_pixels, orientation, format):
    pixels = random_pixels(3, 6, 4)
    if format == "tiff_lzw" and orientation not in UPRIGHT:
        pytest.skip("PIL does not write it")
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"compression": "tiff_lzw"} if format == "tiff_lzw" else {}
    if format == "webp":
        options["lossless"] = True
    data = encode(pixels, format.split("_")[0], exif=exif, **options)
    turned = orientation in range(2, 9)
    changes = (f"turned upright (EXIF orientation {orientation})",) if turned else ()
    check(data, UPRIGHT.get(orientation, UPRIGHT[1])(pixels), *changes)


def test_damaged_exif_does_not_cost_the_image(random_pixels):
    data = encode(random_pixels(0), "png", exif=b"Exif\0\0MM\0*\0\0\0\xffrubbish")
    check(data, random_pixels(0))


def test_floating_point_levels():
    data = (CASES / "float_0_to_1.tif").read_bytes()
    with PIL.Image.open(io.BytesIO(data)) as image:
        levels = np.asarray(image)
    expected = as_rgb(np.rint(levels * 255).astype(np.uint8))
    assert expected.max() > 150
    check(data, expected, "floating-point levels 0..1 scaled to 0..255")


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (np.array([[0, 255]], np.float32), "levels from 0 to 255; expected 0 to 1"),
        (np.array([[-0.5, 1]], np.float32), "levels from -0.5 to 1"),
        (np.array([[0, np.nan]], np.float32), "levels from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "levels from 0 to inf"),
        (np.array([[0, 70_000]], np.int32), "levels of 32 bit from 0 to 70000"),
        (np.array([[0, 200]], np.int32), "levels of 32 bit from 0 to 200"),
    ],
)
def test_levels_without_a_plain_meaning_are_refused(levels, message):
    with pytest.raises(UnreadableImageError, match=f"image a/b.tif cannot be read: .*{message}"):
        decode_image(encode(levels, "tiff"), "a/b.tif")


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("format", ["png", "tiff", "ppm"])
def test_16_bit_levels_are_scaled(grey, format, photometric):
    levels = grey.astype(np.uint16) * 257
    options = {"tiffinfo": {262: photometric}} if format == "tiff" else {}
    inverted = format == "tiff" and photometric == 0
    expected = as_rgb(255 - grey if inverted else grey)
    check(encode(levels, format, **options), expected, "16 bit scaled to 8")


def test_16_bit_color(random_pixels):
    check(encode_deep_png(random_pixels(3)), random_pixels(3), "16 bit scaled to 8")


def encode_deep_png(pixels):
    """A PNG of 16 bits per channel, which PIL reads but does not write."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    height, width = pixels.shape[:2]
    lines = (pixels.astype(">u2") * 257).reshape(height, -1)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_color_modes(grey, random_pixels):
    rgb = random_pixels(1)
    check(encode(rgb), rgb)
    check(encode(grey), as_rgb(grey), "L to RGB")
    check(encode(grey > 127), as_rgb((grey > 127) * np.uint8(255)), "1 to RGB")
    cyan = PIL.Image.new("CMYK", (8, 16), (255, 0, 0, 0))
    converted = np.broadcast_to(np.array([0, 255, 255], np.uint8), (16, 8, 3))
    check(encode(cyan, "tiff"), converted, "CMYK to RGB")
    palette = PIL.Image.fromarray(rgb).quantize(8)
    check(encode(palette), np.asarray(palette.convert("RGB")), "P to RGB")


def test_ycbcr(random_pixels):
    ycc = PIL.Image.fromarray(random_pixels(1)).convert("YCbCr")
    data = encode(ycc, "tiff")
    try:
        PIL.Image.open(io.BytesIO(data)).load()
    except OSError:
        pytest.skip(f"Pillow {PIL.__version__} cannot read what it writes")
    check(data, np.asarray(ycc.convert("RGB")), "YCbCr to RGB")


def test_transparency_is_dropped(grey, random_pixels):
    rgb, faint = random_pixels(1), np.full((16, 8, 1), 7, np.uint8)
    check(encode(np.concatenate([rgb, faint], -1)), rgb, "transparency dropped")
    with_alpha = PIL.Image.merge("LA", [PIL.Image.fromarray(grey)] * 2)
    check(encode(with_alpha), as_rgb(grey), "transparency dropped", "LA to RGB")
    palette = PIL.Image.fromarray(rgb).quantize(8)
    data = encode(palette, transparency=bytes([0, 128]))
    check(data, np.asarray(palette.convert("RGB")), "transparency dropped", "P to RGB")


@pytest.mark.parametrize("format", ["gif", "tiff", "png", "webp"])
def test_of_several_frames_the_first_is_taken(random_pixels, format):
    first, second = (PIL.Image.fromarray(random_pixels(i)) for i in range(2))
    options = {"lossless": True} if format == "webp" else {}
    data = encode(first, format, save_all=True, append_images=[second], **options)
    decoded = decode_image(data, "x")
    assert decoded.changes[-1] == "first of several frames"
    if format != "gif":
        np.testing.assert_array_equal(decoded.pixels, random_pixels(0))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_no_image(data, reason):
    with pytest.raises(UnreadableImageError, match=f"image x.jpg cannot be read: {reason}"):
        decode_image(data, "x.jpg")


@pytest.mark.parametrize("format", ["jpeg", "png", "tiff", "webp", "bmp", "gif"])
def test_truncated_files_are_refused(random_pixels, format):
    data = encode(random_pixels(0, 64, 32), format)
    with pytest.raises(UnreadableImageError, match=r"image x cannot be read"):
        decode_image(data[: len(data) // 2], "x")


def test_an_image_of_too_many_pixels_is_refused():
    """A few bytes that would take gigabytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk
    data += struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT\0\0\0\0"
    with pytest.raises(UnreadableImageError, match=r"image bomb\.png cannot be read"):
        decode_image(data, "bomb.png")


def test_files_that_cannot_be_read(tmp_path):
    for path in ("absent.jpg", "nul\0.jpg", "."):
        with pytest.raises(UnreadableImageError, match="cannot be read"):
            decoding.read_image(tmp_path / path)
    with pytest.raises(UserError, match=r"1 images cannot be read: .*absent\.jpg \(No such file"):
        decoding.load_images([tmp_path / "absent.jpg"], height=4, width=4)

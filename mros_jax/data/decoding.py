"""Image files of any kind and size, as a network wants them: upright, 8 bit, RGB.

The one decoder of this project: training, evaluation, the doctor and `extract` see the same pixels.
"""

import dataclasses
import io
import math
import os
import pathlib
import threading
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from mros_jax.data import jpeg
from mros_jax.data.prefetch import prefetch
from mros_jax.errors import UserError

# Part of every cache key: whatever changes decoded pixels must change it.
VERSION = 3
# What PIL reads by itself; others, such as EPS, it hands to programs of the machine. Its reader of
# JPEG takes MPO as well.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
_loading_formats = threading.Lock()
_MAX_PIXELS = 89_478_485  # where PIL begins to warn of decompression bombs
_EXIF_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF
_WHITE_IS_ZERO = 0


class UnreadableImageError(UserError):
    """An image file that is not there, damaged, or of a kind without a plain meaning.

    Attributes:
        name: the file.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"image {name} cannot be read: {reason}")
        self.name, self.reason = name, reason


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An image as it is trained on.

    Attributes:
        pixels: RGB grey levels.
        changes: what had to be done to it, in plain words; empty for an upright 8-bit RGB image.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    changes: tuple[str, ...] = ()


def decode_image(data: bytes, name: str = "") -> Decoded:
    """Decode one image.

    - An EXIF orientation is applied, so that people stand upright.
    - Grey levels of 16 bit (of 12 in TIFF) are scaled to 8, not clipped; floating-point ones are
      scaled where they all lie in 0..1. Other floating-point and 32-bit levels could mean anything
      and are refused.
    - CMYK, YCbCr, Lab, grey and palette images become RGB; transparency is dropped.
    - Of several frames or pages the first is taken.

    Args:
        data: an encoded image: JPEG, PNG, TIFF, BMP, GIF, WebP, JPEG 2000 or PPM.
        name: of the file, for errors.

    Raises:
        UnreadableImageError: truncated, not an image, with more than 89 million pixels, or with
            levels of no plain meaning.
    """
    try:
        return _decode(data)
    except UserError as error:
        raise UnreadableImageError(name, str(error)) from error
    except PIL.UnidentifiedImageError as error:
        reason = "not an image (JPEG, PNG, TIFF, BMP, GIF, WebP, PPM)" if data else "an empty file"
        raise UnreadableImageError(name, reason) from error
    except Exception as error:  # PIL raises many types on broken files
        raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error


def _decode(data: bytes) -> Decoded:
    pixels = jpeg.decode_plain(data, _MAX_PIXELS)
    if pixels is not None:
        return Decoded(pixels)
    with _loading_formats:  # PIL does it when they are first asked for, which threads must not
        PIL.Image.init()
    with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as file:
        if math.prod(file.size) > _MAX_PIXELS:
            raise UserError(
                f"{file.width} x {file.height} pixels; expected at most {_MAX_PIXELS:,} in all"
            )
        mode, bits = file.mode, _bits(file, data)
        white_is_zero = _tiff_tag(file, _PHOTOMETRIC) == _WHITE_IS_ZERO
        frames = getattr(file, "n_frames", 1)
        orientation = _orientation(file)
        file.load()
        # PIL turns TIFF files by itself while loading, and then forgets their orientation.
        image: PIL.Image.Image = (
            PIL.ImageOps.exif_transpose(file) if _orientation(file) > 1 else file
        )
        changes = []
        if mode.startswith("I") or mode == "F":
            image, change = _scale(image, bits, white_is_zero)
            changes.append(change)
        elif bits == 16:  # PIL keeps the upper 8 bits without saying so
            changes.append("16 bit scaled to 8")
        elif mode in ("P", "PA") or "transparency" in file.info:
            image = image.convert("RGBA")
        elif mode in ("La", "RGBa"):  # multiplied by their transparency
            image = image.convert(mode.upper())
        if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in file.info:
            changes.append("transparency dropped")
        if not mode.startswith(("RGB", "I", "F")):
            changes.append(f"{mode} to RGB")
        if orientation > 1:
            changes.append(f"turned upright (EXIF orientation {orientation})")
        if frames > 1:
            changes.append("first of several frames")
        return Decoded(np.asarray(image.convert("RGB")), tuple(changes))


def _orientation(file: PIL.Image.Image) -> int:
    """Read how the camera was held: 1 upright, 2 to 8 mirrored or turned."""
    try:
        orientation = file.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # pixels are as good without a damaged EXIF block
        return 1
    return orientation if orientation in range(1, 9) else 1


def _tiff_tag(file: PIL.Image.Image, tag: int) -> object:
    return getattr(file, "tag_v2", {}).get(tag)


def _bits(file: PIL.Image.Image, data: bytes) -> int:
    """Read the bits of a level; 8 where the format knows no others."""
    if file.format == "PNG":
        return data[24]
    per_sample = _tiff_tag(file, _BITS_PER_SAMPLE)
    if isinstance(per_sample, tuple) and per_sample:
        return int(max(per_sample))
    return 16 if file.mode.startswith("I") else 8


def _scale(image: PIL.Image.Image, bits: int, white_is_zero: bool) -> tuple[PIL.Image.Image, str]:
    """Scale grey levels that are not of 8 bit; also return what was done."""
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"floating-point grey levels from {low:g} to {high:g}; expected 0 to 1, or 8 bit"
            )
        scaled, change = np.rint(levels * 255), "floating-point levels 0..1 scaled to 0..255"
    else:
        top = 2**bits - 1
        if bits > 16 or low < 0 or high > top:
            raise UserError(f"grey levels of {bits} bit from {low} to {high}; expected 8 or 16 bit")
        levels = levels.astype(np.int64)
        if white_is_zero:
            levels = top - levels
        scaled, change = (levels * 255 + top // 2) // top, f"{bits} bit scaled to 8"
    return PIL.Image.fromarray(scaled.astype(np.uint8)), change


def read_image(path: str | os.PathLike[str]) -> Decoded:
    """Read and decode an image file.

    Raises:
        UnreadableImageError: it is not there, may not be read, or as for `decode_image`.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableImageError(os.fspath(path), reason) from error
    return decode_image(data, os.fspath(path))


def decode_images(
    paths: Sequence[str | os.PathLike[str]],
) -> list[UInt8[np.ndarray, "_ _ 3"] | UnreadableImageError]:
    """Read and decode image files in threads.

    Returns:
        For each file its RGB pixels (H, W, 3), or what is wrong with it.
    """

    def decode(path: str | os.PathLike[str]) -> np.ndarray | UnreadableImageError:
        try:
            return read_image(path).pixels
        except UnreadableImageError as error:
            return error

    threads = os.cpu_count() or 1
    return list(prefetch(paths, decode, depth=2 * threads, num_threads=threads))


def resize(
    pixels: UInt8[np.ndarray, "_ _ 3"],
    height: int,
    width: int,
    interpolation: str = "bilinear",
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resize an image by PIL, as the evaluation transform does.

    First across, then down, which each round to whole grey levels: Pillow before 13 always did so;
    since 13 it begins with whichever costs less, and its result may differ by a grey level.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    image = PIL.Image.fromarray(pixels)
    kind = PIL.Image.Resampling[interpolation.upper()]
    across = image.resize((width, image.height), kind)
    return np.asarray(across.resize((width, height), kind))


def load_images(
    images: Sequence[np.ndarray | str | os.PathLike[str]],
    *,
    height: int,
    width: int,
    interpolation: str = "bilinear",
) -> UInt8[np.ndarray, "N {height} {width} 3"]:
    """Bring images of any size, or files, to one size, as the store does.

    Args:
        images: uint8 (H, W, 3) RGB each, or paths of image files.
        height: of the result, in pixels.
        width: of the result, in pixels.
        interpolation: "bilinear" or "bicubic".

    Raises:
        UserError: files that cannot be read, all of them named, or arrays of another type or rank.
    """
    files = [image for image in images if not isinstance(image, np.ndarray)]
    decoded = decode_images(files)
    bad = [error for error in decoded if isinstance(error, UnreadableImageError)]
    if bad:
        listed = "; ".join(f"{error.name} ({error.reason})" for error in bad)
        raise UserError(f"{len(bad)} images cannot be read: {listed}")
    found = iter(decoded)
    result = np.empty((len(images), height, width, 3), np.uint8)
    for i, given in enumerate(images):
        pixels = given if isinstance(given, np.ndarray) else next(found)
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.ndim != 3
            or pixels.shape[-1] != 3
            or pixels.dtype != np.uint8
        ):
            kind = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else pixels
            raise UserError(f"image {i} is {kind}; expected uint8 RGB (H, W, 3)")
        result[i] = resize(pixels, height, width, interpolation)
    return result

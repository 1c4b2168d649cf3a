"""Image files of any kind and size, as a network wants them."""

import concurrent.futures
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from mros_jax.data.store import decode_image


def decode_images(paths: Sequence[str | os.PathLike]) -> list[np.ndarray | Exception]:
    """Decodes files in threads.

    Args:
      paths: image files in any format that PIL reads.

    Returns:
      For each file its RGB pixels (H, W, 3) uint8, or the exception that reading it raised.
    """

    def decode(path: str | os.PathLike) -> np.ndarray | Exception:
        try:
            return decode_image(pathlib.Path(path).read_bytes())[0]
        except Exception as error:  # PIL raises what it likes on broken files
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(decode, paths))


def load_images(
    images: Sequence[np.ndarray | str | os.PathLike], *, height: int, width: int
) -> UInt8[np.ndarray, "N height width 3"]:
    """Brings images of any size, or files, to one size by PIL's bilinear filter, as the store does.

    Args:
      images: uint8 (H, W, 3) RGB each, or paths of image files.
      height: of the result, in pixels.
      width: of the result, in pixels.

    Raises:
      ValueError: files that cannot be read, all of them named, or arrays of another type or rank.
    """
    files = {i: image for i, image in enumerate(images) if not isinstance(image, np.ndarray)}
    decoded = dict(zip(files, decode_images(list(files.values())), strict=True))
    bad = [f"{files[i]} ({error})" for i, error in decoded.items() if isinstance(error, Exception)]
    if bad:
        raise ValueError(f"{len(bad)} images cannot be read: {'; '.join(bad)}")
    result = np.empty((len(images), height, width, 3), np.uint8)
    for i, given in enumerate(images):
        pixels = decoded.get(i, given)
        assert isinstance(pixels, np.ndarray)
        if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                f"image {i} is {pixels.dtype} {pixels.shape}; expected uint8 RGB (H, W, 3)"
            )
        if pixels.shape[:2] != (height, width):
            image = PIL.Image.fromarray(pixels)
            pixels = np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR))
        result[i] = pixels
    return result

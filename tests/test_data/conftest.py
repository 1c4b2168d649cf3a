"""Tiny replicas of data sets in their layouts as distributed."""

import io
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture
def messages():
    """The messages that the library logs, as a list of texts."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("mros_jax")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def _encode(pixels: np.ndarray, format: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def _random_pixels(seed: int, height: int = 16, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def encode():
    """`encode(pixels, format="jpeg")` returns an image file's bytes."""
    return _encode


@pytest.fixture
def random_pixels():
    """`random_pixels(seed, height, width)` returns uint8 RGB noise."""
    return _random_pixels


class Layout:
    """Writes images with different content at given paths below a root."""

    def __init__(self, root: pathlib.Path):
        self.root, self.count = root, 0

    def write(self, folder: str, *names: str, height: int = 16, width: int = 8) -> None:
        for name in names:
            path = self.root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.count += 1
            format = "png" if path.suffix == ".png" else "jpeg"
            path.write_bytes(_encode(_random_pixels(self.count, height, width), format))


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "root")


@pytest.fixture
def market(layout):
    """Two training identities (2 and 7), three queries, a gallery with junk and a distractor."""
    layout.write(
        "bounding_box_train",
        "0002_c1s1_000451_03.jpg",
        "0002_c2s1_000551_01.jpg",
        "0007_c2s3_071052_01.jpg",
        "0007_c3s3_077419_03.jpg",
        "0007_c3s3_077420_03.jpg",
    )
    layout.write(
        "query", "0001_c1s1_001051_00.jpg", "0003_c2s1_000151_00.jpg", "0003_c1s6_015971_00.jpg"
    )
    layout.write(
        "bounding_box_test",
        "-1_c1s1_000401_03.jpg",
        "0000_c1s1_000151_01.jpg",
        "0001_c1s1_001051_03.jpg",
        "0001_c2s1_001976_01.jpg",
        "0003_c2s1_000151_01.jpg",
        "0003_c1s6_015971_01.jpg",
    )
    (layout.root / "bounding_box_test" / "Thumbs.db").write_bytes(b"clutter")
    (layout.root / "readme.txt").write_text("as distributed")
    return layout

"""Appearance features: those of extraction, in the form that trackers ask for."""

import logging

import jax
import numpy as np
import pytest
from PIL import Image

from mros_jax.errors import UserError
from mros_jax.gallery import describe, list_images
from mros_jax.inference import Embedder
from mros_jax.tracking import Appearance, cut
from tests.least import Pixels

SIZE = 12 * 6 * 3


@pytest.fixture(scope="module")
def model():
    return Embedder(Pixels(), {}, height=12, width=6)


@pytest.fixture(scope="module")
def frame():
    return np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)


@pytest.fixture(scope="module")
def boxes():
    """Ten of people, of which the first two reach beyond the frame."""
    rng = np.random.default_rng(1)
    first = rng.uniform(0, [120, 40], (10, 2))
    made = np.concatenate([first, first + rng.uniform([8, 20], [40, 50], (10, 2))], axis=1)
    made[0, :2], made[1, 2:] = (-7.3, -2), (171.2, 99)
    return made


def test_equal_to_extracting_the_crops_from_files(model, frame, boxes, tmp_path):
    for i, (left, top, right, bottom) in enumerate(np.rint(boxes).astype(int)):
        crop = frame[max(top, 0) : min(bottom, 90), max(left, 0) : min(right, 160)]
        Image.fromarray(crop).save(tmp_path / f"{i}.png")
    extracted = describe(model, list_images(tmp_path)).features
    expected = extracted / np.linalg.norm(extracted, axis=1, keepdims=True)
    rgb = Appearance(model, channels="rgb", batch_sizes=(4,))
    found = rgb.get_features(boxes, frame)
    assert found.shape == (10, SIZE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    bgr = Appearance(model, batch_sizes=(4,))
    np.testing.assert_array_equal(bgr.get_features(boxes, frame[:, :, ::-1]), found)
    assert np.abs(bgr.get_features(boxes, frame) - found).max() > 0.01


def test_nothing_is_compiled_when_frames_come_in(model, frame, boxes, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax"), "propagate", True)  # programs turn it off
    appearance = Appearance(model, batch_sizes=(8, 2, 4))
    whole = appearance.get_features(boxes, frame)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for num in range(11):
            found = appearance.get_features(boxes[:num], frame)
            np.testing.assert_allclose(found, whole[:num], rtol=1e-5, atol=1e-6)
        assert not [told for told in caplog.messages if "Compiling" in told]
        Appearance(model, batch_sizes=(20,))  # while others are
        assert [told for told in caplog.messages if "Compiling" in told]


def test_no_boxes(model, frame):
    appearance = Appearance(model, batch_sizes=(2,))
    for empty in (np.empty((0, 4)), np.empty((0, 6), np.float32), np.array([])):
        found = appearance.get_features(empty, frame)
        assert found.shape == (0, SIZE)
        assert found.dtype == np.float32


def test_boxes_are_rounded_and_cut_at_the_frame(frame):
    given = np.array([
        [10, 20, 30, 60, 0.9, 1],  # with confidence and class, as detectors have them
        [9.6, 19.7, 30.4, 60.2, 0, 0],
        [-5, -5, 8, 9, 0, 0],
        [150, 80, 900, 900, 0, 0],
        [40, 50, 40, 50, 0, 0],  # no area
        [159.8, 3, 160, 9, 0, 0],  # less than a pixel
        [-30, 10, -20, 20, 0, 0],  # outside
        [500, 500, 600, 600, 0, 0],
    ])  # fmt: skip
    expected = [
        frame[20:60, 10:30],
        frame[20:60, 10:30],
        frame[0:9, 0:8],
        frame[80:90, 150:160],
        frame[50:51, 40:41],
        frame[3:9, 159:160],
        frame[10:20, 0:1],
        frame[89:90, 159:160],
    ]
    for crop, wanted in zip(cut(frame, given), expected, strict=True):
        np.testing.assert_array_equal(crop, wanted)


@pytest.mark.usefixtures("unchecked")
def test_bad_input(model, frame):
    appearance = Appearance(model, batch_sizes=(2,))
    box = np.array([[1.0, 2, 30, 40]])
    for boxes, told in (
        (np.array([1.0, 2, 3, 4]), r"boxes are float64 \(4,\)"),
        (box[:, :3], r"boxes are float64 \(1, 3\)"),
        (np.array([["a"] * 4]), "expected numbers"),
        (np.array([[1, 2, 3, 4], [1, 2, np.nan, 4]]), "box 1 is .*nan"),
        (np.array([[60, 50, 20, 40]]), r"box 0 is \[60.*left <= right"),
    ):
        with pytest.raises(UserError, match=told):
            appearance.get_features(boxes, frame)
    for image in (frame.astype(np.float32), frame[:, :, 0], frame[:0], frame[..., :2]):
        with pytest.raises(UserError, match=r"expected uint8 \(H, W, 3\)"):
            appearance.get_features(box, image)
    with pytest.raises(UserError, match="channels is 'gray'"):
        Appearance(model, channels="gray")  # type: ignore[arg-type]
    for sizes, told in (((), "is empty"), ((0,), "batch_sizes is 0")):
        with pytest.raises(UserError, match=told):
            Appearance(model, batch_sizes=sizes)

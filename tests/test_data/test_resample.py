import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mros_jax.data import augment, decoding
from mros_jax.data.augment import preprocess
from mros_jax.data.resample import INTERPOLATIONS, make_taps, resample_axis, resize_any

SIZES = [
    ((16, 8), (48, 16)),  # the ratio of 128x64 -> 384x128
    ((48, 16), (48, 16)),
    ((16, 8), (12, 8)),
    ((50, 30), (24, 8)),  # shrinking: PIL antialiases
    ((13, 9), (24, 8)),  # larger one way, smaller the other
    ((9, 31), (24, 8)),
    ((1, 1), (6, 4)),
    ((7, 5), (1, 1)),
]

# Compiled as a whole, as users run it: one operation after another takes longer.
resize = jax.jit(augment.resize, static_argnames=("height", "width", "interpolation"))


def pil_resize(images, height, width, interpolation="bilinear"):
    """The definition that our resize must equal, whichever axis Pillow would begin with."""
    kind = Image.Resampling[interpolation.upper()]
    pictures = [Image.fromarray(image) for image in images]
    across = [picture.resize((width, picture.height), kind) for picture in pictures]
    return np.stack([np.asarray(picture.resize((width, height), kind)) for picture in across])


@pytest.mark.parametrize("out", [(1, 3), (3, 1), (2, 5), (1, 4)])
@pytest.mark.parametrize("size", [(2, 2), (5, 3), (5, 5), (3, 5)])
def test_files_are_resized_like_arrays(size, out):
    """Shapes for which Pillow 13 begins with the height, too."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resize(image[None], height=out[0], width=out[1], interpolation="bicubic")
    np.testing.assert_array_equal(decoding.resize(image, out[0], out[1], "bicubic"), ours[0])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_resize_equals_pil(size, out, interpolation):
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    images[1] = images[1] > 127  # extremes 0 and 1, and then 0 and 255
    images[2] = (images[2] > 127) * 255
    ours = resize(images, height=out[0], width=out[1], interpolation=interpolation)
    np.testing.assert_array_equal(ours, pil_resize(images, out[0], out[1], interpolation))


@settings(max_examples=10, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    out=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    interpolation=st.sampled_from(INTERPOLATIONS),
    seed=st.integers(0, 2**32 - 1),
)
def test_resize_of_any_size_equals_pil(size, out, interpolation, seed):
    images = np.random.default_rng(seed).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    ours = resize(images, height=out[0], width=out[1], interpolation=interpolation)
    np.testing.assert_array_equal(ours, pil_resize(images, out[0], out[1], interpolation))


def test_same_size_is_untouched():
    images = np.random.default_rng(0).integers(0, 256, (1, 6, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(images, height=6, width=4), images)


def test_taps_are_a_partition():
    for size, out in [(64, 128), (128, 64), (100, 7), (5, 5)]:
        taps = make_taps(size, out)
        np.testing.assert_allclose(taps.weights.sum(1) / 2**22, 1, atol=1e-5)
        assert (taps.indices >= 0).all()
        assert (taps.indices < size).all()
    assert make_taps(64, 128).weights.shape[1] == 2
    assert make_taps(64, 64).weights.shape[1] == 1
    with pytest.raises(ValueError, match="0 pixels to 5"):
        make_taps(0, 5)


def test_positions_choose_outputs():
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 256, (9, 4), dtype=np.uint8))
    taps = make_taps(9, 14)
    whole = resample_axis(rows, taps, 0)
    wanted = jnp.array([3, 3, 13, 0])
    np.testing.assert_array_equal(resample_axis(rows, taps, 0, wanted), whole[wanted])


def test_preprocess_normalises():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 4, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pil_resize(images, 24, 8) / 255 - mean) / std
    ours = jax.jit(lambda x: preprocess(x, height=24, width=8))(images)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=1e-5)
    half = jax.eval_shape(lambda x: preprocess(x, height=24, width=8, dtype=jnp.bfloat16), images)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_programs_for_any_size_resize_the_same(interpolation):
    """One program with symbolic sizes, as exported files have it."""

    def to_48x16(images):
        return resize_any(images, height=48, width=16, interpolation=interpolation)

    shape = jax.export.symbolic_shape("b, h, w, 3")
    exported = jax.export.export(jax.jit(to_48x16))(jax.ShapeDtypeStruct(shape, np.uint8))
    for size in ((16, 8), (48, 16), (1, 1), (13, 90), (301, 7)):
        shape = (2, *size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = resize(images, height=48, width=16, interpolation=interpolation)
        np.testing.assert_array_equal(exported.call(images), expected)

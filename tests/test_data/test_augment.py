import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from mros_jax.data import augment as augmentation
from mros_jax.data.augment import (
    AugmentParams,
    apply_params,
    augment_batch,
    draw_params,
    preprocess,
    ten_crops,
)
from mros_jax.errors import UserError

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
H, W, PAD = 48, 16, 5
example_keys = jax.jit(augmentation.example_keys)  # as in a step: part of a program


def augment(images, keys):
    return augment_batch(images, keys, height=H, width=W, pad=PAD)


augment_jitted = jax.jit(augment)


def by_pil(image, params, fill, resize=(H, W), pad=PAD, kind=Image.Resampling.BILINEAR):
    """The transform as PIL and NumPy define it: resize, mirror, pad, crop, normalise, erase."""
    picture = Image.fromarray(image).resize(resize[::-1], kind)
    if params.flip:
        picture = ImageOps.mirror(picture)
    picture = ImageOps.expand(picture, pad, fill=0)
    row, column = map(int, params.offset)
    picture = picture.crop((column, row, column + W, row + H))
    result = (np.asarray(picture) / 255 - MEAN) / STD
    top, left, tall, wide = map(int, params.erase_box)
    result[top : top + tall, left : left + wide] = MEAN if fill == "public" else 0
    return result


@pytest.mark.parametrize("fill", ["mean", "public"])
def test_equals_pil_for_given_parameters(fill):
    rng = np.random.default_rng(0)
    apply = jax.jit(
        lambda image, params: apply_params(
            image, params, height=H, width=W, pad=PAD, erase_fill=fill
        )
    )
    corners = [(0, 0), (0, 2 * PAD), (2 * PAD, 0), (2 * PAD, 2 * PAD), (PAD, PAD), (3, 8)]
    boxes = [(0, 0, 0, 0), (0, 0, 47, 15), (40, 10, 8, 6), (1, 2, 3, 4)]
    for flip in (False, True):
        for corner in corners:
            for box in boxes:
                image = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
                params = AugmentParams(
                    jnp.array(flip), jnp.array(corner, jnp.int32), jnp.array(box, jnp.int32)
                )
                ours, expected = apply(image, params), by_pil(image, params, fill)
                np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("pad", "interpolation"), [(0, "bilinear"), (2, "bicubic")])
def test_crop_from_a_larger_image_equals_pil(pad, interpolation):
    rng = np.random.default_rng(1)
    big = (H + 6, W + 3)
    kind = Image.Resampling[interpolation.upper()]
    options = {"height": H, "width": W, "resize": big, "pad": pad, "interpolation": interpolation}
    apply = jax.jit(lambda image, params: apply_params(image, params, **options))
    for flip in (False, True):
        for corner in [(0, 0), (6 + 2 * pad, 3 + 2 * pad), (0, 3), (4, 1)]:
            image = rng.integers(0, 256, (24, 10, 3), dtype=np.uint8)
            params = AugmentParams(
                jnp.array(flip), jnp.array(corner, jnp.int32), jnp.array((4, 3, 9, 5), jnp.int32)
            )
            expected = by_pil(image, params, "mean", big, pad, kind)
            np.testing.assert_allclose(apply(image, params), expected, atol=1e-6, rtol=1e-5)


def test_offsets_in_a_larger_image_are_uniform():
    """33 x 17 places of 256 x 128 in 288 x 144."""
    draw = jax.jit(
        jax.vmap(lambda key: draw_params(key, height=256, width=128, resize=(288, 144), pad=0))
    )
    offset = np.asarray(draw(example_keys(0, 0, np.arange(40_000))).offset)
    assert (offset.max(axis=0) == (32, 16)).all()
    joint = np.bincount(offset[:, 0] * 17 + offset[:, 1], minlength=33 * 17)
    assert within(joint, 40_000, 1 / len(joint)).all()


def test_resize_to_the_inputs_size_changes_no_bit():
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 8, 3), dtype=np.uint8)
    keys = example_keys(3, 7, np.arange(8))
    same = jax.jit(lambda x, k: augment_batch(x, k, height=H, width=W, pad=PAD, resize=(H, W)))
    np.testing.assert_array_equal(same(images, keys), augment_jitted(images, keys))


@pytest.mark.parametrize("size", [(40, 16), (41, 19), (48, 24)])
def test_ten_crops_are_torchvisions(size):
    """`ten_crop` as it is documented: corners and center of the image, then of its mirror image."""
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    ours = jax.jit(
        lambda x: ten_crops(preprocess(x, height=size[0], width=size[1]), height=40, width=16)
    )(images)
    assert ours.shape == (10, 2, 40, 16, 3)
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        for side in range(2):
            tall, wide = picture.height - 40, picture.width - 16
            center = (round(tall / 2), round(wide / 2))
            for j, (y, x) in enumerate([(0, 0), (0, wide), (tall, 0), (tall, wide), center]):
                crop = np.asarray(picture.crop((x, y, x + 16, y + 40)))
                expected = (crop / 255 - MEAN) / STD
                np.testing.assert_allclose(ours[5 * side + j, i], expected, rtol=1e-4, atol=1e-5)
            picture = ImageOps.mirror(picture)


def test_ten_crops_of_a_smaller_image():
    with pytest.raises(UserError, match=r"ten crops of 40 x 16 cannot be cut .* 39 x 16"):
        ten_crops(jnp.zeros((1, 39, 16, 3)), height=40, width=16)


@pytest.fixture(scope="module")
def draws():
    """Parameters of 40,000 examples at the paper's size."""
    keys = example_keys(0, 0, np.arange(40_000))
    draw = jax.jit(jax.vmap(lambda key: draw_params(key, height=384, width=128)))
    return jax.tree.map(np.asarray, draw(keys))


def within(count, n, p):
    """Whether a count of n draws with probability p is believable (5 sigma)."""
    return np.abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_flip_rate(draws):
    assert within(draws.flip.sum(), 40_000, 0.5)


def test_crop_offsets_are_uniform(draws):
    assert draws.offset.min() == 0
    assert draws.offset.max() == 20
    joint = np.bincount(draws.offset[:, 0] * 21 + draws.offset[:, 1], minlength=441)
    for axis in range(2):
        counts = np.bincount(draws.offset[:, axis], minlength=21)
        assert within(counts, 40_000, 1 / 21).all()
    assert within(joint, 40_000, 1 / 441).all()


def reference_boxes(count, seed=0):
    """Random erasing as the public code does it, one attempt after another, in NumPy."""
    rng = np.random.default_rng(seed)
    boxes: list[tuple[int, int]] = []
    while len(boxes) < count:
        area = rng.uniform(0.02, 0.4, 10 * count) * 384 * 128
        aspect = rng.uniform(0.3, 1 / 0.3, 10 * count)
        tall = np.rint(np.sqrt(area * aspect)).astype(int)
        wide = np.rint(np.sqrt(area / aspect)).astype(int)
        # Rejected attempts are drawn again, so the accepted ones are what one example sees.
        fits = (tall < 384) & (wide < 128)
        boxes += list(zip(tall[fits], wide[fits], strict=True))
    return np.array(boxes[:count])


def test_erased_area_and_aspect_follow_the_definition(draws):
    erased = draws.erase_box[:, 2] > 0
    # About two thirds of the attempts fit, so that all 100 failing is out of the question.
    assert within(erased.sum(), 40_000, 0.5)
    ours = draws.erase_box[erased, 2:]
    expected = reference_boxes(200_000)
    for measure in (lambda b: b[:, 0] * b[:, 1] / (384 * 128), lambda b: b[:, 0] / b[:, 1]):
        edges = np.quantile(measure(expected), np.linspace(0, 1, 13))
        edges[[0, -1]] = -np.inf, np.inf
        share = np.histogram(measure(expected), edges)[0] / len(expected)
        counts = np.histogram(measure(ours), edges)[0]
        assert within(counts, len(ours), share).all()
    assert ours[:, 0].max() < 384
    assert ours[:, 1].max() < 128


def test_erased_place_is_uniform(draws):
    top, left, tall, wide = draws.erase_box[draws.erase_box[:, 2] > 0].T
    for place, room in ((top, 384 - tall), (left, 128 - wide)):
        assert (place >= 0).all()
        assert (place <= room).all()
        spread = (place + 0.5) / (room + 1)
        counts = np.histogram(spread, np.linspace(0, 1, 6))[0]
        # Where there is little room the values are few; the bins then hold about a fifth.
        np.testing.assert_allclose(counts / len(place), 0.2, atol=0.03)
        wide_room = room >= 100
        if wide_room.any():
            counts = np.histogram(spread[wide_room], np.linspace(0, 1, 6))[0]
            assert (np.abs(counts / wide_room.sum() - 0.2) < 0.02).all()


def test_draws_are_independent(draws):
    erased = draws.erase_box[:, 2] > 0
    for one, other in ((draws.flip, erased), (draws.flip, draws.offset[:, 0] > 10)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(draws.offset[:, 0], draws.offset[:, 1])[0, 1]) < 0.03


def test_nothing_fits_nothing_is_erased():
    # Aspect 0.3 at 90 % of a tall image is wider than the image, always.
    draw = jax.jit(
        jax.vmap(
            lambda key: draw_params(
                key, height=384, width=128, erase=1, erase_area=(0.9, 0.9), erase_aspect=(0.3, 0.3)
            )
        )
    )
    assert (draw(example_keys(0, 0, np.arange(50))).erase_box[:, 2:] == 0).all()


def test_probabilities_zero_and_one():
    def draw(**options):
        keys = example_keys(0, 0, np.arange(200))
        return jax.jit(jax.vmap(lambda key: draw_params(key, height=H, width=W, **options)))(keys)

    never, always = draw(flip=0, pad=0, erase=0), draw(flip=1, erase=1)
    assert not never.flip.any()
    assert (never.offset == 0).all()
    assert (never.erase_box[:, 2:] == 0).all()
    assert always.flip.all()
    assert (always.erase_box[:, 2:] > 0).all()


def test_noise_fills_what_is_erased_and_nothing_else():
    """N(0, 1) after normalizing, another number for every pixel, channel and example."""
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 8, 3), dtype=np.uint8)
    keys = example_keys(1, 2, np.arange(32))
    make = lambda fill: jax.jit(  # noqa: E731
        lambda x, k: augment_batch(x, k, height=96, width=32, erase=1.0, erase_fill=fill)
    )(images, keys)
    noisy, plain = np.asarray(make("noise")), np.asarray(make("mean"))
    draw = jax.jit(jax.vmap(lambda key: draw_params(key, height=96, width=32, erase=1.0)))
    boxes = draw(keys).erase_box
    inner = []
    for box, ours, other in zip(np.asarray(boxes), noisy, plain, strict=True):
        top, left, tall, wide = box
        inside = np.zeros((96, 32), bool)
        inside[top : top + tall, left : left + wide] = True
        np.testing.assert_array_equal(ours[~inside], other[~inside])
        assert (other[inside] == 0).all()
        inner.append(ours[inside])
    drawn = np.concatenate(inner)
    assert len(np.unique(drawn)) > 0.9 * drawn.size
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 1], atol=0.02)
    assert 0.0015 < (np.abs(drawn) > 3).mean() < 0.0045  # 0.0027 of a normal distribution
    assert np.abs(np.corrcoef(drawn, rowvar=False) - np.eye(3)).max() < 0.03
    still = AugmentParams(jnp.array(False), jnp.zeros(2, int), jnp.zeros(4, int))
    fill = functools.partial(apply_params, height=H, width=W, erase_fill="noise")
    with pytest.raises(ValueError, match="needs the example's key"):
        jax.eval_shape(fill, images[0], still)


def test_one_color_fills_what_is_erased():
    """Three grey levels of 0..255 for each image, normalized; others in each."""
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 8, 3), dtype=np.uint8)
    keys = example_keys(1, 2, np.arange(64))
    options: Any = {"height": 16, "width": 8, "pad": 0, "erase": 1.0, "erase_area": (0.2, 0.2)}
    make = lambda fill: jax.jit(  # noqa: E731
        lambda x, k: augment_batch(x, k, erase_fill=fill, **options)
    )(images, keys)
    colored, plain = np.asarray(make("color")), np.asarray(make("mean"))
    levels = []
    for ours, other in zip(colored, plain, strict=True):
        erased = (other == 0).all(-1)
        (color,) = np.unique(ours[erased], axis=0)
        np.testing.assert_array_equal(ours[~erased], other[~erased])
        levels.append(255 * (color * STD + MEAN))
    drawn = np.array(levels)
    np.testing.assert_allclose(drawn, drawn.round(), atol=1e-3)
    assert drawn.round().min() >= 0
    assert drawn.round().max() <= 255
    assert abs(drawn.mean() - 127.5) < 20
    assert drawn.std() > 60
    assert np.abs(np.corrcoef(drawn, rowvar=False) - np.eye(3)).max() < 0.5


def test_the_corner_that_public_code_erases_at():
    """As far down and to the right as the rectangle is large, before the image is mirrored."""

    def draw(flip, place):
        keys = example_keys(0, 0, np.arange(50))
        options = {"flip": flip, "pad": 0, "erase": 1.0, "erase_place": place}
        one = lambda key: draw_params(key, height=H, width=W, **options)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(one))(keys).erase_box)

    corner, mirrored, uniform = draw(0, "corner"), draw(1, "corner"), draw(0, "uniform")
    np.testing.assert_array_equal(corner[:, 2:], uniform[:, 2:])  # the same sizes
    np.testing.assert_array_equal(corner[:, :2], corner[:, 2:])
    np.testing.assert_array_equal(mirrored[:, 0], corner[:, 0])
    np.testing.assert_array_equal(mirrored[:, 1], W - corner[:, 1] - corner[:, 3])


def test_example_depends_on_seed_step_and_position_alone():
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 8, 3), dtype=np.uint8)
    whole = augment_jitted(images, example_keys(3, 7, np.arange(8)))
    # The same examples as halves of the batch on two devices.
    halves = [
        augment_jitted(images[part], example_keys(3, jnp.int32(7), np.arange(8)[part]))
        for part in (slice(0, 4), slice(4, 8))
    ]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    for seed, step in ((3, 8), (4, 7)):
        assert (
            np.asarray(augment_jitted(images, example_keys(seed, step, np.arange(8)))) != whole
        ).any()


def test_same_on_every_device_count():
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 8, 3), dtype=np.uint8)
    keys = example_keys(0, 0, np.arange(8))
    whole = augment_jitted(images, keys)
    parts = jax.pmap(augment)(images.reshape(4, 2, 16, 8, 3), keys.reshape(4, 2))
    np.testing.assert_array_equal(np.asarray(parts).reshape(whole.shape), whole)


def test_result_is_resize_and_normalise_without_augmentation():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 8, 3), dtype=np.uint8)
    keys = example_keys(0, 0, np.arange(2))
    ours = jax.jit(lambda x, k: augment_batch(x, k, height=H, width=W, flip=0, pad=0, erase=0))(
        images, keys
    )
    still = AugmentParams(jnp.array(False), jnp.array([PAD, PAD]), jnp.zeros(4, int))
    for image, expected in zip(images, ours, strict=True):
        np.testing.assert_allclose(expected, by_pil(image, still, "mean"), atol=1e-6, rtol=1e-5)


def test_dtype():
    images, keys = np.zeros((1, 4, 2, 3), np.uint8), example_keys(0, 0, np.arange(1))
    result = jax.eval_shape(
        lambda x, k: augment_batch(x, k, height=H, width=W, dtype=jnp.bfloat16), images, keys
    )
    assert result.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip is a probability in 0..1, got 1.5"),
        ({"erase": -1}, "erase is a probability"),
        ({"pad": -1}, "pad must not be negative, got -1"),
        ({"erase_area": (0.4, 0.02)}, "erase_area must be ascending"),
        ({"erase_aspect": (0, 1)}, "erase_aspect must be ascending and positive"),
        ({"resize": (H, W - 1)}, "resize is .*; expected .* at least 48 x 16"),
        ({"resize": (H,)}, "expected height and width"),
        ({"erase_fill": "black"}, "is 'black'; expected one of mean, public, noise"),
        ({"interpolation": "lanczos"}, "is 'lanczos'; expected one of bilinear, bicubic"),
    ],
)
def test_wrong_parameters(options, message):
    images, keys = np.zeros((1, 4, 2, 3), np.uint8), example_keys(0, 0, np.arange(1))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, k: augment_batch(x, k, height=H, width=W, **options), images, keys)


def test_other_pixels_than_imagenets():
    """Caffe's: grey levels less a mean, blue first. In training and at test the same."""
    mean, std = (0.4, 0.45, 0.5), (1 / 255, 1 / 255, 0.5)
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 8, 3), np.uint8)
    size = {"height": 24, "width": 8}
    blue_first = images[..., ::-1].astype(np.float64)
    expected = (blue_first / 255 - np.array(mean)) / np.array(std)
    given: dict[str, Any] = {**size, "mean": mean, "std": std, "channels": "bgr"}
    at_test = jax.jit(lambda x: preprocess(x, **given))(images)
    np.testing.assert_allclose(at_test, expected, rtol=1e-5, atol=1e-4)
    still: dict[str, Any] = {"flip": 0.0, "pad": 0, "erase": 0.0}
    augmented = jax.jit(lambda x, k: augment_batch(x, k, **given, **still))(
        images, example_keys(0, 0, np.arange(2))
    )
    np.testing.assert_allclose(augmented, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("mean", (0.5, 0.5), "expected three numbers each"),
        ("std", (0.2, 0.0, 0.2), "above 0"),
        ("channels", "rbg", "channels is 'rbg'; expected one of rgb, bgr"),
    ],
)
def test_pixels_that_are_none_are_refused(field, value, what):
    images = np.zeros((1, 24, 8, 3), np.uint8)
    with pytest.raises(UserError, match=what):
        preprocess(images, height=24, width=8, **{field: value})

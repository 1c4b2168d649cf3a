"""Resize, flip, pad and crop, normalise, erase: one fused function on the accelerator.

Every example has its own key, made from (seed, step, position in the global batch), so a batch
looks the same on any number of devices and after any resume.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, Key, Shaped, UInt8

from mros_jax.data.resample import make_taps, resample_axis, resize_any
from mros_jax.errors import UserError, check_choice

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS = ("rgb", "bgr")  # orders in which a network may take them

ERASE_FILLS = ("mean", "public", "noise", "color")
ERASE_PLACES = ("uniform", "corner")
# Folded into an example's key for the noise, or the color, that fills what is erased.
_NOISE, _COLOR = 2, 3
_ATTEMPTS = 100  # of random erasing to find a rectangle that fits, as the public code has it


class AugmentParams(NamedTuple):
    """What happens to one example; `draw_params` draws it, `apply_params` does it.

    Attributes:
        flip: mirror left and right.
        offset: (2,) row and column of the crop's corner in the resized and padded image.
        erase_box: (4,) top, left, height, width of the erased rectangle; height 0 erases nothing.
    """

    flip: Bool[Array, ""]
    offset: Int32[Array, "2"]
    erase_box: Int32[Array, "4"]


def example_keys(
    seed: int | Int[Array, ""], step: int | Int[Array, ""], positions: Int[np.ndarray | Array, "B"]
) -> Key[Array, "B"]:
    """Return one key per example, a pure function of (seed, step, position).

    Args:
        seed: the run's seed.
        step: the training step, counted from the start of the run.
        positions: (B,) places in the global batch (not in this device's share of it).
    """
    of_step = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda position: jax.random.fold_in(of_step, position))(jnp.asarray(positions))


def draw_params(
    key: Key[Array, ""],
    *,
    height: int,
    width: int,
    resize: Sequence[int] = (),
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    erase_area: tuple[float, float] = (0.02, 0.4),
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3),
    erase_place: str = "uniform",
) -> AugmentParams:
    """Draw what happens to one example.

    The crop's corner is uniform over all possible ones: (2 pad + 1)^2 without `resize`. Random
    erasing (Zhong et al., AAAI 2020): up to 100 times draw an area, uniform in `erase_area` x the
    image's, and an aspect ratio height / width, uniform in `erase_aspect`; sides are sqrt(area *
    aspect) and sqrt(area / aspect), rounded; the first rectangle that is smaller than the image on
    both sides is put at a place uniform over all where it fits. If none of the 100 is, nothing is
    erased. All 100 candidates are drawn at once and the first that fits is taken: the same
    distribution.

    Args:
        key: one key of `example_keys`.
        height: of the network's input, in pixels.
        width: of the network's input, in pixels.
        resize: height and width that images are resized to before the crop; (): the input's.
        flip: probability of mirroring.
        pad: zero pixels added on each side before the crop.
        erase: probability of erasing.
        erase_area: smallest and largest share of the image.
        erase_aspect: smallest and largest height / width.
        erase_place: "uniform", or "corner": as the public code of GSRW, whose rectangle of h x w
            pixels has its upper left corner h pixels down and w to the right in the image before it
            is mirrored, and is cut at the edges.

    Raises:
        UserError: a probability outside 0..1, a negative pad, an empty range, images that are
            resized to less than the crop, or another place.
    """
    tall, wide = resized_size(resize, height, width, "augmentation: resize")
    _check(flip, pad, erase, erase_area, erase_aspect)
    check_choice("erase_place", erase_place, ERASE_PLACES)
    # One call for all numbers: multiples of 2^-23 below 1, so that floor(u n) is 0..n-1, each as
    # probable as the others to n 2^-23.
    u = jax.random.uniform(key, (6 + 2 * _ATTEMPTS,))
    area = height * width * _stretch(u[6 : 6 + _ATTEMPTS], erase_area)
    aspect = _stretch(u[6 + _ATTEMPTS :], erase_aspect)
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    sides = jnp.where(fits[first] & (u[1] < erase), jnp.stack([heights, widths])[:, first], 0)
    room = jnp.array([height, width]) - sides
    corner = jnp.floor(u[4:6] * (room + 1)).astype(jnp.int32)
    mirrored = u[0] < flip
    if erase_place == "corner":
        left = jnp.where(mirrored, width - 2 * sides[1], sides[1])
        corner = jnp.stack([sides[0], left])
    return AugmentParams(
        flip=mirrored,
        offset=jnp.floor(
            u[2:4] * np.array([tall - height + 2 * pad + 1, wide - width + 2 * pad + 1], np.float32)
        ).astype(jnp.int32),
        erase_box=jnp.concatenate([corner, sides]),
    )


def resized_size(
    resize: Sequence[int], height: int, width: int, name: str = "resize"
) -> tuple[int, int]:
    """Height and width that images are resized to, from which `height` x `width` is cut.

    Args:
        resize: both; (): those of the cut.
        height: of the cut.
        width: of the cut.
        name: what `resize` is called in the message.

    Raises:
        UserError: not two numbers, or less than the cut.
    """
    if not resize:
        return height, width
    if len(resize) != 2 or resize[0] < height or resize[1] < width:
        raise UserError(
            f"{name} is {tuple(resize)}; expected height and width of at least {height} x {width}, "
            "which are cut from it, or () for the same"
        )
    return resize[0], resize[1]


def _stretch(unit: Float[Array, "A"], limits: tuple[float, float]) -> Float[Array, "A"]:
    low, high = limits
    if low == high:
        return jnp.full_like(unit, low)
    return (unit + low / (high - low)) * (high - low)  # the order as in _normalize, and why


def _check(
    flip: float,
    pad: int,
    erase: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> None:
    for name, value in (("flip", flip), ("erase", erase)):
        if not 0 <= value <= 1:
            raise UserError(f"augmentation: {name} is a probability in 0..1, got {value}")
    if pad < 0:
        raise UserError(f"augmentation: pad must not be negative, got {pad}")
    if not 0 <= area[0] <= area[1] <= 1:
        raise UserError(f"augmentation: erase_area must be ascending shares in 0..1, got {area}")
    if not 0 < aspect[0] <= aspect[1]:
        raise UserError(f"augmentation: erase_aspect must be ascending and positive, got {aspect}")


def apply_params(
    image: UInt8[Array, "h w 3"],
    params: AugmentParams,
    *,
    height: int,
    width: int,
    resize: Sequence[int] = (),
    interpolation: str = "bilinear",
    pad: int = 10,
    erase_fill: str = "mean",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels: str = "rgb",
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "height width 3"]:
    """Resize, mirror, pad, crop, normalize and erase one image as told.

    Mirror, padding and crop only choose which pixel of the resized image goes where, so the resize
    computes just those. Padding is black before normalising. The erased rectangle becomes the mean
    colour, 0 after normalising (`erase_fill="mean"`); or the numbers 0.485, 0.456, 0.406 after
    normalising (`"public"`, what the usual public code does); or noise of N(0, 1) for each number
    after normalising (`"noise"`); or one colour, whose three grey levels are uniform in 0..255
    (`"color"`).

    Args:
        image: RGB grey levels.
        params: from `draw_params`.
        height: of the result.
        width: of the result.
        resize: as given to `draw_params`.
        interpolation: of the resize, "bilinear" or "bicubic".
        pad: as given to `draw_params`.
        erase_fill: "mean", "public", "noise" or "color".
        mean: as for `preprocess`.
        std: as for `preprocess`.
        channels: as for `preprocess`.
        key: the example's, which "noise" and "color" need.
        dtype: of the result; the arithmetic is float32.

    Raises:
        UserError: unknown `erase_fill` or `interpolation`.
        ValueError: no key for the noise or the colour.
    """
    check_choice("erase_fill", erase_fill, ERASE_FILLS)
    tall, wide = resized_size(resize, height, width, "augmentation: resize")
    rows = jnp.arange(height) + params.offset[0] - pad
    columns = jnp.arange(width) + params.offset[1] - pad
    inside = ((rows >= 0) & (rows < tall))[:, None] & ((columns >= 0) & (columns < wide))
    columns = jnp.where(params.flip, wide - 1 - columns, columns)

    narrow = resample_axis(
        image,
        make_taps(image.shape[1], wide, interpolation),
        1,
        jnp.clip(columns, 0, wide - 1),
    )  # (h, width, 3)
    levels = resample_axis(
        narrow, make_taps(image.shape[0], tall, interpolation), 0, jnp.clip(rows, 0, tall - 1)
    )  # (height, width, 3)
    normalized = _normalize(jnp.where(inside[..., None], levels, 0), mean, std, channels)

    top, left, box_height, box_width = params.erase_box
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    erased = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
    fill = jnp.array(IMAGENET_MEAN if erase_fill == "public" else (0.0, 0.0, 0.0), jnp.float32)
    if erase_fill in ("noise", "color"):
        if key is None:
            raise ValueError(f"erase_fill {erase_fill!r} needs the example's key; got None")
        if erase_fill == "noise":
            own = jax.random.fold_in(key, _NOISE)
            fill = jax.random.normal(own, normalized.shape, jnp.float32)
        else:
            color = jax.random.randint(jax.random.fold_in(key, _COLOR), (3,), 0, 256)
            fill = _normalize(color.astype(jnp.float32), mean, std, channels)
    return jnp.where(erased[..., None], fill, normalized).astype(dtype)


def _normalize(
    levels: Float[Array, "*B 3"], mean: Sequence[float], std: Sequence[float], channels: str
) -> Float[Array, "*B 3"]:
    """Grey levels 0..255 to (level / 255 - mean) / standard deviation."""
    # Subtract, then multiply: a product and a sum after it may or may not be fused by the compiler,
    # and the last bit would depend on the program around it.
    offset, factor = normalization(mean, std)
    check_choice("channels", channels, CHANNELS)
    levels = levels if channels == "rgb" else levels[..., ::-1]
    return (levels - offset) * factor


def normalization(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """What is subtracted from grey levels 0..255, and then multiplied with, float32.

    Args:
        mean: of each channel, as a share of 255.
        std: of each channel, as a share of 255.

    Raises:
        UserError: not three numbers each, or a standard deviation that is not above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(
            f"mean is {tuple(mean)} and std {tuple(std)}; expected three numbers each, as shares "
            "of 255, those of std above 0"
        )
    offset, scale = np.array(mean, np.float64), np.array(std, np.float64)
    return (255 * offset).astype(np.float32), (1 / (255 * scale)).astype(np.float32)


def augment_batch(
    images: UInt8[np.ndarray | Array, "B h w 3"],
    keys: Key[Array, "B"],
    *,
    height: int,
    width: int,
    resize: Sequence[int] = (),
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels: str = "rgb",
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    erase_area: tuple[float, float] = (0.02, 0.4),
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3),
    erase_fill: str = "mean",
    erase_place: str = "uniform",
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B height width 3"]:
    """Augments a batch for training; call it inside the jitted step.

    In this order: resize (as PIL), mirror, zero pad and crop, normalise with mean and
    standard deviation, random erasing. See `draw_params` and `apply_params`.

    Args:
        images: (B, h, w, 3) uint8 as stored; any size.
        keys: (B,) from `example_keys`.
        height: of the network's input, in pixels.
        width: of the network's input, in pixels.
        resize: height and width that images are resized to before the crop; (): the input's.
        interpolation: of the resize, "bilinear" or "bicubic".
        mean: as for `preprocess`.
        std: as for `preprocess`.
        channels: as for `preprocess`.
        flip: probability of mirroring.
        pad: zero pixels on each side before the crop.
        erase: probability of erasing.
        erase_area: smallest and largest share of the image.
        erase_aspect: smallest and largest height / width.
        erase_fill: "mean" (0 after normalising), "public" (0.485, 0.456, 0.406), "noise" or
            "color".
        erase_place: "uniform" or "corner".
        dtype: of the result.

    Returns:
        (B, height, width, 3) normalised images.

    Raises:
        UserError: parameters out of range.
    """
    check_choice("erase_fill", erase_fill, ERASE_FILLS)

    def augment(image: UInt8[Array, "h w 3"], key: Key[Array, ""]) -> Float[Array, "H W 3"]:
        params = draw_params(
            key,
            height=height,
            width=width,
            resize=resize,
            flip=flip,
            pad=pad,
            erase=erase,
            erase_area=erase_area,
            erase_aspect=erase_aspect,
            erase_place=erase_place,
        )
        return apply_params(
            image,
            params,
            height=height,
            width=width,
            resize=resize,
            interpolation=interpolation,
            pad=pad,
            erase_fill=erase_fill,
            mean=mean,
            std=std,
            channels=channels,
            key=key,
            dtype=dtype,
        )

    return jax.vmap(augment)(jnp.asarray(images), keys)


def preprocess(
    images: UInt8[np.ndarray | Array, "B h w 3"],
    *,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels: str = "rgb",
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B height width 3"]:
    """Resize and normalises a batch for evaluation.

    Args:
        images: (B, h, w, 3) uint8, any size.
        height: of the network's input, in pixels.
        width: of the network's input, in pixels.
        interpolation: "bilinear" or "bicubic".
        mean: of each channel of the network's input, as a share of 255; by default ImageNet's.
        std: standard deviation of each, as a share of 255.
        channels: their order in the network's input, "rgb" or "bgr".
        dtype: of the result.

    Returns:
        (B, height, width, 3) normalised images.

    Raises:
        UserError: a mean, standard deviation or order that is none.
    """
    levels = resize(images, height=height, width=width, interpolation=interpolation)
    return _normalize(levels, mean, std, channels).astype(dtype)


def preprocess_any(
    images: UInt8[Array, "B h w 3"],
    *,
    height: int,
    width: int,
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels: str = "rgb",
) -> Float[Array, "B height width 3"]:
    """`preprocess` for programs that are to take images of any size, see `resample.resize_any`."""
    levels = resize_any(images, height=height, width=width, interpolation=interpolation)
    return _normalize(levels, mean, std, channels)


def ten_crops(
    images: Float[Array, "B h w 3"], *, height: int, width: int
) -> Float[Array, "10 B height width 3"]:
    """The four corners and the center of images, then the same of their mirror images.

    Args:
        images: at least as large as the crops.
        height: of a crop, in pixels.
        width: of a crop, in pixels.

    Returns:
        Crops in the order of torchvision's `ten_crop`: top left, top right, bottom left, bottom
        right, center.

    Raises:
        UserError: images smaller than the crops.
    """
    tall, wide = images.shape[1:3]
    if tall < height or wide < width:
        raise UserError(
            f"ten crops of {height} x {width} cannot be cut from images of {tall} x {wide}; resize "
            "them to that size or more (eval.resize)"
        )
    down, right = tall - height, wide - width
    corners = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
    return jnp.stack(
        [
            side[:, top : top + height, left : left + width]
            for side in (images, images[:, :, ::-1])
            for top, left in corners
        ]
    )


def resize(
    images: Shaped[np.ndarray | Array, "B h w 3"],
    *,
    height: int,
    width: int,
    interpolation: str = "bilinear",
) -> Float[Array, "B height width 3"]:
    """Resize as PIL's BILINEAR or BICUBIC does, exactly: first across, then down.

    Pillow since 13 may begin with the height, see `mros_jax.data.decoding.resize`.

    Args:
        images: (B, h, w, 3) grey levels.
        height: of the result.
        width: of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        float32 (B, height, width, 3), whole numbers 0..255.
    """
    across = make_taps(images.shape[2], width, interpolation)
    down = make_taps(images.shape[1], height, interpolation)
    return resample_axis(resample_axis(jnp.asarray(images), across, 2), down, 1)

"""Pooling over horizontal stripes, which may overlap (MROS, Section 3, Figure 2)."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mros_jax.errors import UserError
from mros_jax.models.layers import widen


def pool_stripes(
    features: Float[Array, "*batch H W C"],
    num_stripes: int = 6,
    overlap: bool = True,
    kind: Literal["mean", "max"] = "mean",
) -> Float[Array, "*batch S C"]:
    """Pool a feature map over horizontal stripes, or over pairs of adjacent stripes.

    The map is cut into `num_stripes` equal stripes. With `overlap`, window l is stripes l and
    l + 1 together; since both have the same size its mean is the mean of the two stripe means.

    Args:
        features: (..., H, W, C) feature map.
        num_stripes: s; H must be a multiple of it.
        overlap: pairs of adjacent stripes (S = s - 1) or single stripes (S = s).
        kind: the "mean" or the "max" of each channel in each window; of equal values the
            first in reading order gets the gradient of a maximum, as in PyTorch.

    Returns:
        (..., S, C), at least float32, from the top of the image to the bottom.

    Raises:
        UserError: H is not a multiple of s, s is too small for a window, or another kind.
    """
    if kind not in ("mean", "max"):
        raise UserError(f"kind of pooling is {kind!r}; it must be 'mean' or 'max'")
    if features.ndim < 3:
        raise UserError(f"features have shape {features.shape}; expected (..., H, W, C)")
    height, width, channels = features.shape[-3:]
    if num_stripes < (2 if overlap else 1):
        raise UserError(
            f"num_stripes is {num_stripes}; {'overlapping windows need 2' if overlap else 'use 1'} "
            "or more"
        )
    if height % num_stripes or height == 0:
        below = height // num_stripes * num_stripes
        nearest = [h for h in (below, below + num_stripes) if h > 0]
        raise UserError(
            f"a feature map of height {height} cannot be cut into {num_stripes} equal stripes; "
            f"heights that work are its multiples, here {' or '.join(map(str, nearest))}"
        )
    shape = (*features.shape[:-3], num_stripes, height // num_stripes * width, channels)
    pixels = features.reshape(shape)
    if kind == "max":
        # By its place: XLA's own gradient asks which values equal the maximum, and finds none where
        # the compiler has computed the map twice with other rounding.
        place = jnp.argmax(lax.stop_gradient(pixels), axis=-2, keepdims=True)
        stripes = widen(jnp.take_along_axis(pixels, place, axis=-2)[..., 0, :])  # (..., s, C)
    else:
        wide = jnp.promote_types(features.dtype, jnp.float32)
        stripes = jnp.mean(pixels, axis=-2, dtype=wide)
    if not overlap:
        return stripes
    first, second = stripes[..., :-1, :], stripes[..., 1:, :]  # (..., s - 1, C)
    return jnp.maximum(first, second) if kind == "max" else (first + second) / 2


def stripe_edges(num_stripes: int, overlap: bool) -> list[tuple[float, float]]:
    """Top and bottom of each window of `pool_stripes`, as shares of the height."""
    tall = 2 if overlap else 1
    count = num_stripes - tall + 1
    return [(i / num_stripes, (i + tall) / num_stripes) for i in range(count)]


def check_height(height: int, stride: int, num_stripes: int, level: str) -> None:
    """Refuse images whose feature map cannot be cut into equal stripes.

    Args:
        height: of the images, in pixels.
        stride: pixels of the image for one row of the map.
        num_stripes: s.
        level: what the map is called in the message.

    Raises:
        UserError: names heights that work.
    """
    if num_stripes < 1:
        raise UserError(f"num_stripes is {num_stripes}; it must be 1 or more")
    rows = -(-height // stride)  # padded strides round up
    if rows % num_stripes:
        unit = stride * num_stripes
        below = height // unit * unit
        work = [h for h in (below, below + unit) if h > 0]
        raise UserError(
            f"images of height {height} give a {level} of height {rows}, which cannot be cut into "
            f"{num_stripes} equal stripes; use images of height {' or '.join(map(str, work))} "
            f"(multiples of {unit})"
        )

"""PIL's resize as fixed taps and weights, in the whole numbers that PIL computes with."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Shaped

from mros_jax.errors import UserError, check_choice

# Weights are whole multiples of 2^-22, as Pillow's `Resample.c` rounds them. Grey levels times
# weights and their sums are exact in 32 bits, so that no result depends on the order of sums or on
# the program around it, and so none depends on the device count.
_BITS = 22


@dataclasses.dataclass(frozen=True)
class Taps:
    """One axis of a resize: output i is the sum over t of weights[i, t] * input[indices[i, t]].

    Attributes:
        indices: (out, T) int32, inside the input.
        weights: (out, T) int32, multiples of 2^-22; taps that are not needed weigh 0.
    """

    indices: Int32[np.ndarray, "out T"]
    weights: Int32[np.ndarray, "out T"]


def _triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1/2 (IEEE ASSP 1981)."""
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


# Kernel, and the distance from which on it is 0.
_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
}
INTERPOLATIONS = tuple(_KERNELS)


@functools.cache
def make_taps(size: int, out: int, interpolation: str = "bilinear") -> Taps:
    """Return the taps of one of PIL's filters along one axis.

    When shrinking, the kernel is as much wider as the image shrinks (antialiasing), so that more
    inputs count. The formula is that of Pillow's `Resample.c`.

    Args:
        size: pixels of the input along the axis.
        out: pixels of the output along the axis.
        interpolation: "bilinear" or "bicubic".

    Raises:
        UserError: a size below 1, or an unknown interpolation.
    """
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if size < 1 or out < 1:
        raise UserError(f"cannot resize {size} pixels to {out}: sizes must be at least 1")
    kernel, reach = _KERNELS[interpolation]
    scale = size / out
    wider = max(scale, 1.0)
    rows = []
    for i in range(out):
        center = (i + 0.5) * scale
        first = max(0, int(center - reach * wider + 0.5))
        last = min(size, int(center + reach * wider + 0.5))
        weights = np.array([kernel((x + 0.5 - center) / wider) for x in range(first, last)])
        scaled = weights / weights.sum() * 2**_BITS
        whole = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
        rows.append([(first + k, weight) for k, weight in enumerate(whole) if weight])
    width = max(map(len, rows))
    indices = np.zeros((out, width), np.int32)
    values = np.zeros((out, width), np.int32)
    for i, row in enumerate(rows):
        indices[i] = [x for x, _ in row] + [row[-1][0]] * (width - len(row))
        values[i, : len(row)] = [w for _, w in row]
    return Taps(indices, values)


def resample_axis(
    images: Shaped[Array, "..."],
    taps: Taps,
    axis: int,
    positions: Int[Array, "P"] | None = None,
) -> Float[Array, "..."]:
    """Resize along one axis, rounded to whole grey levels as PIL does after each axis.

    Args:
        images: grey levels 0..255 in any real type, whole numbers.
        taps: from `make_taps`, for the size of that axis.
        axis: the axis to resize.
        positions: the outputs wanted, in any order and any number of times; by default all.

    Returns:
        float32, whole numbers 0..255, with P entries along the axis.
    """
    indices: Array | np.ndarray = taps.indices
    weights: Array | np.ndarray = taps.weights
    if positions is not None:
        indices = jnp.asarray(indices)[positions]
        weights = jnp.asarray(weights)[positions]
    if taps.weights.shape[1] == 1:  # one input each, as where the size stays
        return jnp.take(images, indices[:, 0], axis=axis, mode="clip").astype(jnp.float32)
    shape = [1] * images.ndim
    shape[axis] = -1
    total = jnp.full((), 1 << (_BITS - 1), jnp.int32)  # to the nearest level, halves up
    for t in range(taps.weights.shape[1]):
        tap = jnp.take(images, indices[:, t], axis=axis, mode="clip").astype(jnp.int32)
        total = total + tap * weights[:, t].reshape(shape)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)


# Weights in three parts of 8, 7 and 7 bits: products with grey levels and sums of up to 512 of them
# are exact in float32.
_PARTS = (14, 7, 0)


def resize_any(
    images: Shaped[Array, "B h w 3"], *, height: int, width: int, interpolation: str = "bilinear"
) -> Float[Array, "B height width 3"]:
    """`mros_jax.data.augment.resize` for programs that are to take images of any size.

    The weights are computed by the program itself, as matrices in PIL's float64, so that `h` and
    `w` may be symbolic (`jax.export.symbolic_shape`). Results are equal, bit for bit.

    Args:
        images: grey levels 0..255, whole numbers; to 512 taps, which is shrinking to 1/256.
        height: of the result.
        width: of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        float32, whole numbers 0..255.
    """
    levels = images.astype(jnp.float32)
    for axis, out in ((2, width), (1, height)):
        total = jnp.full((), 1 << (_BITS - 1), jnp.int32)
        weights = _make_weights(levels.shape[axis], out, interpolation)
        for part, shift in zip(weights, _PARTS, strict=True):
            product = jnp.tensordot(levels, part, axes=(axis, 1), precision="highest")
            total = total + (product.astype(jnp.int32) << shift)
        levels = jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)
        levels = jnp.moveaxis(levels, -1, axis)
    return levels


def _make_weights(size: Any, out: int, interpolation: str) -> tuple[Float[Array, "out size"], ...]:
    """The weights of `make_taps` as a matrix in three parts, whole multiples of 2^14, 2^7 and 1."""
    _, reach = _KERNELS[interpolation]
    with jax.enable_x64(True):
        inputs = jnp.asarray(size).astype(jnp.float64)
        scale = inputs / out
        wider = jnp.maximum(scale, 1.0)
        center = (jnp.arange(out, dtype=jnp.float64)[:, None] + 0.5) * scale
        x = jnp.arange(size, dtype=jnp.float64)
        first = jnp.maximum(jnp.floor(center - reach * wider + 0.5), 0.0)
        last = jnp.minimum(jnp.floor(center + reach * wider + 0.5), inputs)
        distance = jnp.abs((x + 0.5 - center) / wider)
        if interpolation == "bilinear":
            kernel = jnp.maximum(1 - distance, 0.0)
        else:
            near = (1.5 * distance - 2.5) * distance * distance + 1
            far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
            kernel = jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))
        kernel = jnp.where((x >= first) & (x < last), kernel, 0.0)
        scaled = kernel / jnp.sum(kernel, axis=1, keepdims=True) * 2.0**_BITS
        rest = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5)
        parts = []
        for shift in _PARTS:
            part = jnp.floor(rest / 2.0**shift)
            rest = rest - part * 2.0**shift
            parts.append(part.astype(jnp.float32))
    return tuple(parts)

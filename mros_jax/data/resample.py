"""PIL's bilinear resize as fixed taps and weights, in whole numbers of grey levels."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from mros_jax.errors import UserError

# Weights are whole multiples of 1 / _UNIT. Grey levels of 8 bits times weights of 16 are exact in
# float32, sums below 256 as well: no result depends on the order of sums or on fused operations,
# and so none depends on the device count or the program around it.
_UNIT = 2.0**16


@dataclasses.dataclass(frozen=True)
class Taps:
    """One axis of a resize: output i is the sum over t of weights[i, t] * input[indices[i, t]].

    Attributes:
        indices: (out, T) int32, inside the input.
        weights: (out, T) float32, multiples of 2^-16 with rows that sum to 1 exactly; taps that are
            not needed weigh 0.
    """

    indices: Int32[np.ndarray, "out T"]
    weights: Float32[np.ndarray, "out T"]


@functools.cache
def bilinear_taps(size: int, out: int) -> Taps:
    """Return the taps of PIL's bilinear filter along one axis.

    The filter is a triangle; when shrinking, it is as wide as the shrinkage (antialiasing), so that
    more than two inputs count. The formula is that of Pillow's `Resample.c`.

    Args:
        size: pixels of the input along the axis.
        out: pixels of the output along the axis.

    Raises:
        UserError: a size below 1.
    """
    if size < 1 or out < 1:
        raise UserError(f"cannot resize {size} pixels to {out}: sizes must be at least 1")
    scale = size / out
    support = max(scale, 1.0)
    rows = []
    for i in range(out):
        center = (i + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        last = min(size, int(center + support + 0.5))
        weights = [max(0.0, 1 - abs((x + 0.5 - center) / support)) for x in range(first, last)]
        used = [first + k for k, weight in enumerate(weights) if weight > 0]
        parts = np.array([weight for weight in weights if weight > 0])
        parts = np.rint(parts / parts.sum() * _UNIT)
        parts[parts.argmax()] += _UNIT - parts.sum()
        rows.append(list(zip(used, parts / _UNIT, strict=True)))
    width = max(map(len, rows))
    indices = np.zeros((out, width), np.int32)
    values = np.zeros((out, width), np.float32)
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
        taps: from `bilinear_taps`, for the size of that axis.
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
    shape = [1] * images.ndim
    shape[axis] = -1
    total = jnp.zeros((), jnp.float32)
    for t in range(taps.weights.shape[1]):
        tap = jnp.take(images, indices[:, t], axis=axis, mode="clip").astype(jnp.float32)
        total = total + tap * weights[:, t].reshape(shape)
    # The fixed-point sum of PIL rounds halves up.
    return jnp.floor(total + 0.5) if taps.weights.shape[1] > 1 else total

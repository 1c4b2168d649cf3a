"""Rectangles cut out of feature maps at places that are learned (Jaderberg et al., NIPS 2015).

A rectangle is shifted and scaled, not turned, so that rows and columns are interpolated each by
themselves: the cut is a product with one matrix on each side.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mros_jax.models.layers import widen


def interpolation(positions: Float[Array, "*B N"], size: int) -> Float[Array, "*B N {size}"]:
    """Weights that interpolate linearly at real positions of `size` numbers; outside is 0.

    The gradient at a whole position is that towards the next number, as PyTorch's is.

    Args:
        positions: 0 is the first number, size - 1 the last.
        size: how many numbers there are.
    """
    low = jnp.floor(lax.stop_gradient(positions))
    share = (positions - low)[..., None]
    index = jnp.arange(size, dtype=positions.dtype)
    low = low[..., None]
    return jnp.where(index == low, 1 - share, 0) + jnp.where(index == low + 1, share, 0)


def sampled_positions(
    shift: Float[Array, "*B"], scale: float, size: int, *, align_corners: bool
) -> Float[Array, "*B {size}"]:
    """Where a grid of `size` places samples an axis of that size, in its own pixels.

    With u from -1 to 1 along the axis, it samples scale u + shift.

    Args:
        shift: of the grid's center, -1 to 1.
        scale: length of the grid as a share of the axis.
        size: of the axis, and places of the grid.
        align_corners: -1 and 1 are the centers of the first and the last pixel (True), or the outer
            edges of these (False); as PyTorch's argument of that name.
    """
    places = np.arange(size, dtype=np.float64)
    last = max(size - 1, 1)
    u = 2 * places / last - 1 if align_corners else (2 * places + 1) / size - 1
    sampled = shift[..., None] + jnp.asarray(scale * u, shift.dtype)
    if align_corners:
        return (sampled + 1) * ((size - 1) / 2)
    return ((sampled + 1) * size - 1) / 2


def resize_weights(size: int, out: int) -> Float[np.ndarray, "out size"]:
    """Weights of a linear resize whose first and last numbers stay what they were."""
    positions = np.arange(out) * ((size - 1) / max(out - 1, 1))
    low = np.minimum(positions.astype(int), max(size - 2, 0))
    weights = np.zeros((out, size))
    weights[np.arange(out), low] = 1 - (positions - low)
    if size > 1:
        weights[np.arange(out), low + 1] = positions - low
    return weights


def resize_map(x: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B h w C"]:
    """Resize bilinearly with aligned corners; computed in float32 at least."""
    rows, columns = (
        jnp.asarray(resize_weights(size, out), widen(x).dtype)
        for size, out in zip(x.shape[1:3], (height, width), strict=True)
    )
    tall = jnp.einsum("ih,bhwc->biwc", rows, widen(x), precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, tall, precision="highest").astype(x.dtype)


def cut_regions(
    x: Float[Array, "B H W C"],
    shifts: Float[Array, "B R 2"],
    *,
    scale: tuple[float, float],
    height: int,
    width: int,
    align_corners: bool,
) -> Float[Array, "B R {height} {width} C"]:
    """Cut R rectangles of each map and resize them.

    A rectangle is sampled at as many places as the map has, and that resized with aligned corners,
    both bilinearly. Outside of the map is 0.

    Args:
        x: the maps.
        shifts: of the rectangles' centers to the right and down, -1 to 1.
        scale: their width and height as a share of the map's.
        height: of the result.
        width: of the result.
        align_corners: of the sampling, see `sampled_positions`.

    Returns:
        In the type of `x`; computed in float32 at least.
    """
    weights = []
    for axis, out in ((1, height), (0, width)):
        size = x.shape[2 - axis]
        positions = sampled_positions(
            shifts[..., axis], scale[axis], size, align_corners=align_corners
        )
        resized = jnp.asarray(resize_weights(size, out), shifts.dtype)
        sampled = interpolation(positions, size)  # (B, R, size, size)
        weights.append(jnp.einsum("ij,brjk->brik", resized, sampled, precision="highest"))
    rows, columns = weights
    tall = jnp.einsum("brih,bhwc->briwc", rows, widen(x), precision="highest")
    return jnp.einsum("brjw,briwc->brijc", columns, tall, precision="highest").astype(x.dtype)

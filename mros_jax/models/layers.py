"""Functions whose gradients are written out, because XLA's own are slow on a CPU.

Each equals what differentiating its forward pass gives; the tests compare them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def multiply(x: Float[Array, "M C"], kernel: Float[Array, "C F"]) -> Float[Array, "M F"]:
    """Matrix product of a tall `x` whose gradient by `kernel` is quick on a CPU."""
    return x @ kernel


def _multiply_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _multiply_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    if kernel.shape[0] > kernel.shape[1]:
        # Eigen is up to 1.9 times as quick with the smaller side first. The barrier keeps XLA from
        # turning the transposed product back into the slow one.
        dkernel = lax.optimization_barrier(dy.T @ x).T
    else:
        dkernel = x.T @ dy
    return dy @ kernel.T, dkernel


multiply.defvjp(_multiply_forward, _multiply_backward)


@jax.custom_vjp
def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Maximum over 3x3 windows, stride 2, one pixel of -inf on every side (as PyTorch pads).

    Of equal values the first in reading order gets the gradient, as in PyTorch. XLA's own gradient
    (select and scatter) took 94 ms for four 192x64x64 maps on one core where this takes 4.
    """
    return functools.reduce(jnp.maximum, _window_values(x))


def _window_values(x: Array) -> list[Array]:
    """The nine values of every window, (B, H2, W2, C) each, in reading order."""
    _, height, width, _ = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    pad = ((0, 0), (1, 2 * rows - height), (1, 2 * columns - width), (0, 0))
    x = jnp.pad(x, pad, constant_values=-jnp.inf)
    return [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]


def _max_pool_forward(x: Array) -> tuple[Array, Array]:
    return max_pool(x), x


def _max_pool_backward(x: Array, dy: Array) -> tuple[Array]:
    best, *others = _window_values(x)
    winner = jnp.zeros(dy.shape, jnp.int8)
    for place, value in enumerate(others, start=1):
        better = value > best
        best = jnp.where(better, value, best)
        winner = jnp.where(better, jnp.int8(place), winner)

    def won(i: int, j: int) -> Array:
        """Gradient to row i, column j of each window, placed at the pixel between windows."""
        part = jnp.where(winner == 3 * i + j, dy, 0)
        if i == 0:  # the next window's top row is this window's bottom row
            part = jnp.pad(part[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        if j == 0:
            part = jnp.pad(part[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
        return part

    # A pixel at even row and column lies in one window only, at odd ones in two or four.
    even = jnp.stack([won(1, 1), won(1, 2) + won(1, 0)], axis=3)  # (B, H2, W2, 2, C)
    odd = jnp.stack([won(2, 1) + won(0, 1), won(2, 2) + won(2, 0) + won(0, 2) + won(0, 0)], axis=3)
    dx = jnp.stack([even, odd], axis=2)  # (B, H2, 2, W2, 2, C)
    batch, rows, columns, channels = dy.shape
    dx = dx.reshape(batch, 2 * rows, 2 * columns, channels)
    return (dx[:, : x.shape[1], : x.shape[2]],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    bias: Float[Array, "..."],
    epsilon: float,
    axis_name: str | None,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Normalise `x` with its own statistics over the axes that `scale` does not have.

    The gradient is written out (Ioffe & Szegedy, 2015, Section 3): two sums and one pass, where
    differentiating the forward pass takes twice that.

    Returns:
        The result, at least float32; mean and biased variance, which carry no gradient.
    """
    return _normalize_forward(x, scale, bias, epsilon, axis_name)[0]


def _normalize_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    axes = tuple(range(x.ndim - scale.ndim))
    wide = widen(x)
    mean = jnp.mean(wide, axes)
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
    # A second pass for the variance: E[x^2] - E[x]^2 cancels.
    var = jnp.mean(jnp.square(wide - mean), axes)
    if axis_name is not None:
        var = lax.pmean(var, axis_name)
    inverse = lax.rsqrt(var + epsilon)
    y = (wide - mean) * (inverse * scale) + bias
    return (y, mean, var), (x, scale, mean, inverse)


def _normalize_backward(
    epsilon: float,
    axis_name: str | None,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = saved
    dy = cotangents[0]
    axes = tuple(range(x.ndim - scale.ndim))
    centred = widen(x) - mean
    dbias = jnp.sum(dy, axes)
    dscale = jnp.sum(dy * centred, axes) * inverse
    total_dbias, total_dscale = dbias, dscale
    if axis_name is not None:
        total_dbias, total_dscale = lax.psum((dbias, dscale), axis_name)
    count = count_values(x, scale.ndim, axis_name)
    dx = (scale * inverse) * (dy - total_dbias / count - centred * (inverse * total_dscale / count))
    return dx.astype(x.dtype), dscale, dbias


normalize.defvjp(_normalize_forward, _normalize_backward)


def count_values(x: Float[Array, "..."], feature_axes: int, axis_name: str | None) -> int:
    """Values per channel, over all devices of the axis."""
    count = math.prod(x.shape[:-feature_axes])
    # psum of a constant is the static number of devices
    return count if axis_name is None else count * int(lax.psum(1, axis_name))


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32, whatever the compute dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

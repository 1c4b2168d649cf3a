"""Operations written twice: for CPUs, and for accelerators, whose compilers want them plain.

Which of the two is used is decided where a program is compiled, by what it is compiled for. Both
compute the same, values and gradients; the tests compare them with each other and with a plain
forward pass.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# The same function for the same arguments: as one function, each use of it is traced once.
_bind = functools.cache(functools.partial)
_plainly: contextvars.ContextVar[bool] = contextvars.ContextVar("plainly", default=False)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What is traced within it is the accelerators' form alone, as other compilers want it, too."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


def _by_platform(
    cpu: Callable[..., Array], accelerator: Callable[..., Array], **static: int
) -> Callable[..., Array]:
    """A function that is `cpu` on a CPU and `accelerator` elsewhere, its gradient as well.

    Args:
        cpu: of arrays, and of numbers by name; no function made for one call: what is made of it
            stays.
        accelerator: the same.
        static: the numbers.
    """
    if _plainly.get():
        return functools.partial(accelerator, **static)
    return _make_choice(cpu, accelerator, **static)


@functools.cache  # as one function, each use of it is traced once
def _make_choice(
    cpu: Callable[..., Array], accelerator: Callable[..., Array], **static: int
) -> Callable[..., Array]:
    """The choice is made outside of differentiation: JAX would keep what both of them save."""
    on_cpu, elsewhere = (functools.partial(f, **static) for f in (cpu, accelerator))

    def pull(function: Callable[..., Array], dy: Array, *args: Array) -> Any:
        return jax.vjp(function, *args)[1](dy)

    pull_on_cpu, pull_elsewhere = (functools.partial(pull, f) for f in (on_cpu, elsewhere))

    @jax.custom_vjp
    def chosen(*args: Array) -> Array:
        result: Array = lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)
        return result

    def forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
        return chosen(*args), args

    def backward(args: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
        gradients: tuple[Array, ...] = lax.platform_dependent(
            dy, *args, cpu=pull_on_cpu, default=pull_elsewhere
        )
        return gradients

    chosen.defvjp(forward, backward)
    return chosen


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C F"], stride: int
) -> Float[Array, "B H2 W2 F"]:
    """Square convolution, padded by K // 2."""
    if kernel.shape[0] > 1:
        return convolve_plainly(x, kernel, stride)
    return _by_platform(convolve_1x1_on_cpu, convolve_plainly, stride=stride)(x, kernel)


def convolve_plainly(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C F"], stride: int
) -> Float[Array, "B H2 W2 F"]:
    """`convolve`, as XLA does it."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convolve_1x1_on_cpu(
    x: Float[Array, "B H W C"], kernel: Float[Array, "1 1 C F"], stride: int
) -> Float[Array, "B H2 W2 F"]:
    """`convolve` as a matrix product: XLA's CPU convolution and its gradients are far slower."""
    x = x[:, ::stride, ::stride]
    y = multiply(x.reshape(-1, x.shape[-1]), kernel[0, 0])  # (B * H2 * W2, F)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


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


def convolve_depthwise(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K 1 C"], stride: int, dilation: int = 1
) -> Float[Array, "B H2 W2 C"]:
    """Square convolution of each channel by itself, padded by dilation * (K // 2)."""
    forms = convolve_depthwise_by_shifts, convolve_depthwise_plainly
    return _by_platform(*forms, stride=stride, dilation=dilation)(x, kernel)


def convolve_depthwise_plainly(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K 1 C"], stride: int, dilation: int
) -> Float[Array, "B H2 W2 C"]:
    """`convolve_depthwise`, as XLA does it."""
    pad = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def convolve_depthwise_by_shifts(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K 1 C"], stride: int, dilation: int
) -> Float[Array, "B H2 W2 C"]:
    """`convolve_depthwise` as a sum of shifted maps, as on a CPU; this form can be vmapped.

    XLA's CPU convolution of groups took 90 ms for eight 24x8x256 maps with their gradients on two
    cores; this takes 10.
    """
    size = kernel.shape[0]
    values = _window_values(x, stride, size=size, dilation=dilation, fill=0)
    weights = kernel.reshape(-1, kernel.shape[-1])  # (K * K, C), in reading order
    total = sum(widen(v) * widen(w) for v, w in zip(values, weights, strict=True))
    return jnp.asarray(total, x.dtype)


def max_pool(x: Float[Array, "B H W C"], stride: int = 2) -> Float[Array, "B H2 W2 C"]:
    """Maximum over 3x3 windows, one pixel of -inf on every side (as PyTorch pads).

    Of equal values the first in reading order gets the gradient, as in PyTorch.
    """
    return _by_platform(max_pool_on_cpu, max_pool_plainly, stride=stride)(x)


def max_pool_plainly(x: Float[Array, "B H W C"], stride: int = 2) -> Float[Array, "B H2 W2 C"]:
    """`max_pool`, as XLA does it."""
    pad = ((0, 0), (1, 1), (1, 1), (0, 0))
    lowest = np.array(-np.inf, x.dtype)
    strides = (1, stride, stride, 1)
    largest: Array = lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), strides, pad)
    return largest


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool_on_cpu(x: Float[Array, "B H W C"], stride: int = 2) -> Float[Array, "B H2 W2 C"]:
    """`max_pool` with a gradient that is quick on a CPU.

    XLA's own (select and scatter) took 94 ms for four 192x64x64 maps on one core; this takes 4.
    """
    return functools.reduce(jnp.maximum, _window_values(x, stride))


def _window_values(
    x: Array, stride: int, *, size: int = 3, dilation: int = 1, fill: float = -jnp.inf
) -> list[Array]:
    """The values of every window, size^2 maps (B, H2, W2, C), in reading order."""
    reach = dilation * (size // 2)
    rows, columns = (-(-length // stride) for length in x.shape[1:3])
    ends = [
        (reach, max(stride * (count - 1) + 1 + reach - length, 0))
        for count, length in ((rows, x.shape[1]), (columns, x.shape[2]))
    ]
    x = jnp.pad(x, ((0, 0), *ends, (0, 0)), constant_values=fill)
    offsets = range(0, size * dilation, dilation)
    return [
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
        for i in offsets
        for j in offsets
    ]


def _max_pool_forward(x: Array, stride: int) -> tuple[Array, Array]:
    return max_pool_on_cpu(x, stride), x


def _max_pool_backward(stride: int, x: Array, dy: Array) -> tuple[Array]:
    best, *others = _window_values(x, stride)
    winner = jnp.zeros(dy.shape, jnp.int8)
    for place, value in enumerate(others, start=1):
        better = value > best
        best = jnp.where(better, value, best)
        winner = jnp.where(better, jnp.int8(place), winner)
    if stride != 2:
        places = [jnp.where(winner == place, dy, 0) for place in range(9)]
        pull = jax.linear_transpose(lambda x: _window_values(x, stride, fill=0), x)
        (dx,) = pull(places)
        return (dx,)

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


max_pool_on_cpu.defvjp(_max_pool_forward, _max_pool_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalize(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    bias: Float[Array, "..."],
    guess: Float[Array, "..."],
    epsilon: float,
    axis_name: str | None,
    pool: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Normalise `x` with its own statistics over the axes that `scale` does not have.

    The gradient is written out (Ioffe & Szegedy, 2015, Section 3): two sums and one pass, where
    differentiating the forward pass takes twice that.

    Args:
        x: values.
        scale: of the result.
        bias: of the result.
        guess: a number near the mean, see `moments_in_one_pass`; it changes rounding only.
        epsilon: added to the variance.
        axis_name: axis of the devices that share statistics; None: each has its own.
        pool: normalise what `max_pool` makes of `x`, with the statistics of all of it.

    Returns:
        The result, at least float32; mean and biased variance, which carry no gradient.
    """
    return _normalize_forward(x, scale, bias, guess, epsilon, axis_name, pool)[0]


def normalize_and_pool(
    x: Float[Array, "B H W C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    guess: Float[Array, "C"],
    epsilon: float,
    axis_name: str | None,
) -> tuple[Float[Array, "B H2 W2 C"], Float[Array, "C"], Float[Array, "C"]]:
    """`max_pool` of the result of `normalize`, the large map of which is never made.

    A channel's result rises with `x`, or falls where its scale is negative, rounding included: the
    largest result of a window is that of its largest value, or of its smallest. Where rounding (or
    a scale of 0) makes results equal, the gradient goes to that value and not to the first.
    """
    sign = jnp.where(scale < 0, -1.0, 1.0).astype(scale.dtype)
    rising = x * sign.astype(x.dtype)
    y, mean, var = normalize(rising, sign * scale, bias, sign * guess, epsilon, axis_name, True)
    return y, sign * mean, var


def moments_in_two_passes(
    x: Float[Array, "..."], guess: Float[Array, "..."], axis_name: str | None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and biased variance over the axes that `guess` does not have; it is not looked at."""
    axes, wide = tuple(range(x.ndim - guess.ndim)), widen(x)
    mean = _average(jnp.mean(wide, axes), axis_name)
    return mean, _average(jnp.mean(jnp.square(wide - mean), axes), axis_name)


def moments_in_one_pass(
    x: Float[Array, "..."], guess: Float[Array, "..."], axis_name: str | None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The same in one pass, which an accelerator's compiler adds to what computes `x`.

    E[x^2] - E[x]^2 cancels where the mean is large beside the deviation. That of x - guess does
    not: it loses log2(1 + (mean - guess)^2 / variance) bits.
    """
    axes, shifted = tuple(range(x.ndim - guess.ndim)), widen(x) - guess
    sums = jnp.mean(shifted, axes), jnp.mean(jnp.square(shifted), axes)
    mean, square = _average(sums, axis_name)
    return mean + guess, jnp.maximum(square - jnp.square(mean), 0)


def _average(values: Any, axis_name: str | None) -> Any:
    return values if axis_name is None else lax.pmean(values, axis_name)


def _normalize_forward(
    x: Array,
    scale: Array,
    bias: Array,
    guess: Array,
    epsilon: float,
    axis_name: str | None,
    pool: bool,
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    mean, var = lax.platform_dependent(
        x,
        guess,
        cpu=_bind(moments_in_two_passes, axis_name=axis_name),
        default=_bind(moments_in_one_pass, axis_name=axis_name),
    )
    inverse = lax.rsqrt(var + epsilon)
    kept = max_pool(x) if pool else x
    y = (widen(kept) - mean) * (inverse * scale) + bias
    return (y, mean, var), (x, kept, scale, mean, inverse)


def _normalize_backward(
    epsilon: float,
    axis_name: str | None,
    pool: bool,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
    x, kept, scale, mean, inverse = saved
    dy = cotangents[0]
    axes = tuple(range(x.ndim - scale.ndim))
    dbias = jnp.sum(dy, axes)
    dscale = jnp.sum(dy * (widen(kept) - mean), axes) * inverse
    total_dbias, total_dscale = dbias, dscale
    if axis_name is not None:
        total_dbias, total_dscale = lax.psum((dbias, dscale), axis_name)
    count = count_values(x, scale.ndim, axis_name)
    if pool:
        (scattered,) = jax.vjp(max_pool, x)[1](dy.astype(x.dtype))
        dy = widen(scattered)
    centred = widen(x) - mean
    dx = (scale * inverse) * (dy - total_dbias / count - centred * (inverse * total_dscale / count))
    return dx.astype(x.dtype), dscale, dbias, jnp.zeros_like(mean)


normalize.defvjp(_normalize_forward, _normalize_backward)


def count_values(x: Float[Array, "..."], feature_axes: int, axis_name: str | None) -> int:
    """Values per channel, over all devices of the axis."""
    count = math.prod(x.shape[:-feature_axes])
    # psum of a constant is the static number of devices
    return count if axis_name is None else count * int(lax.psum(1, axis_name))


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32, whatever the compute dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

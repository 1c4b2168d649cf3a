"""Operations on an edge of a searched cell, of a name each.

They are DARTS's (Liu et al., ICLR 2019) and the part-aware one of Auto-ReID (Quan et al., ICCV
2019). Each keeps a map's channels; with stride 2 it halves the map.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mros_jax.errors import UserError
from mros_jax.models.heads import Reduction, uniform_init
from mros_jax.models.inception import average_pool
from mros_jax.models.layers import (
    convolve_depthwise,
    convolve_depthwise_by_shifts,
    max_pool,
    widen,
)
from mros_jax.models.resnet import BatchNorm, Conv

PARTS = 4  # M, horizontal parts that the part-aware operation relates


class Operation(nn.Module):
    """What all of them share: (B, H, W, C) -> (B, H / stride, W / stride, features), rounded up.

    Attributes:
        features: channels that come out; as many go in.
        stride: 1 or 2.
        affine: learn scale and bias of batch normalizations. In a search they have none, so that
            an operation cannot make up for a small weight.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    features: int
    stride: int = 1
    affine: bool = True
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    def _conv(self, features: int, name: str, stride: int = 1) -> Conv:
        return Conv(features, 1, stride, self.dtype, kernel_init=uniform_init, name=name)

    def _norm(self, name: str) -> BatchNorm:
        return BatchNorm(
            use_scale=self.affine,
            use_bias=self.affine,
            axis_name=self.bn_axis_name,
            dtype=self.dtype,
            name=name,
        )

    def _halve(self, x: Array, train: bool) -> Array:
        reduce = FactorizedReduce(
            self.features, 2, self.affine, self.dtype, self.bn_axis_name, name="reduce"
        )
        halved: Array = reduce(x, train=train)
        return halved


class Pool(Operation):
    """Maximum or mean over 3x3 windows; what is outside of the map counts for neither.

    It is normalized where `affine` is False, as DARTS does in the search alone.
    """

    kind: str = "max"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 C"]:
        """Pool."""
        if self.kind == "max":
            y = max_pool(x, self.stride)
        else:
            wide = widen(x)
            inside = np.outer(_share_inside(x.shape[1]), _share_inside(x.shape[2]))[..., None]
            mean = average_pool(wide) / jnp.asarray(inside, wide.dtype)
            y = mean[:, :: self.stride, :: self.stride]
        y = y.astype(self.dtype)
        return y if self.affine else self._norm("bn")(y, train=train)


def _share_inside(length: int) -> np.ndarray:
    """Of each window along an axis, the share that lies in the map."""
    places = np.arange(length)
    return np.asarray((3 - (places == 0) - (places == length - 1)) / 3)


class Separable(Operation):
    """`times` times: ReLU, 3x3 depthwise and 1x1 convolution, batch normalization."""

    times: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 C"]:
        """Apply it; the first depthwise convolution has the stride."""
        for i in range(1, self.times + 1):
            shape = (3, 3, 1, x.shape[-1])
            kernel = jnp.asarray(Kernel(shape, name=f"depthwise{i}")(), self.dtype)
            stride = self.stride if i == 1 else 1
            # In a search, many side by side: JAX cannot vmap the other form's gradient.
            convolve = convolve_depthwise if self.affine else convolve_depthwise_by_shifts
            x = convolve(nn.relu(x).astype(self.dtype), kernel, stride, self.dilation)
            x = self._conv(self.features, f"pointwise{i}")(x)
            x = self._norm(f"norm{i}")(x, train=train)
        return x


class Kernel(nn.Module):
    """A convolution's weights by themselves, started as PyTorch does."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        """The weights, float32."""
        return jnp.asarray(self.param("kernel", uniform_init, self.shape, jnp.float32))


class FactorizedReduce(Operation):
    """ReLU, and a convolution that halves the map and sees all of it; batch normalization.

    Two 1x1 convolutions of stride 2 give half of the channels each; the second sees the map one
    pixel further down and right, 0 behind its edge.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 F"]:
        """Apply it."""
        x = nn.relu(x)
        shifted = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
        first = self.features // 2
        halves = [
            self._conv(first, "conv1", stride=2)(x),
            self._conv(self.features - first, "conv2", stride=2)(shifted),
        ]
        return self._norm("bn")(jnp.concatenate(halves, axis=-1), train=train)


class Skip(Operation):
    """The map itself, or what `FactorizedReduce` makes of it."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 C"]:
        """Apply it."""
        return x if self.stride == 1 else self._halve(x, train)


class PartAware(Operation):
    """Adds to each of four horizontal parts what it has in common with the others.

    The vectors of `PartAttention` are put beside all pixels of their part, and a 1x1 convolution or
    a `FactorizedReduce` makes `features` channels of the C + C // 3.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 C"]:
        """Apply it.

        Raises:
            UserError: the map has fewer rows than parts, or fewer than 3 channels.
        """
        vectors, _ = PartAttention(self.bn_axis_name, name="attention")(x, train=train)
        rows = np.diff(split_rows(x.shape[1]))
        beside = jnp.concatenate(
            [
                jnp.broadcast_to(v[:, None, None], (*x.shape[:1], count, x.shape[2], v.shape[-1]))
                for v, count in zip(jnp.unstack(vectors, axis=1), rows.tolist(), strict=True)
            ],
            axis=1,
        )
        y = jnp.concatenate([x, beside.astype(x.dtype)], axis=-1)
        if self.stride == 2:
            return self._halve(y, train)
        return self._norm("bn")(self._conv(self.features, "conv")(y), train=train)


class PartAttention(nn.Module):
    """Mixes vectors of four horizontal parts by how much each asks of the others.

    Each part's mean passes a ReLU, and a linear layer to h = C // 3 numbers and a batch
    normalization of its own: f_i. With two linear layers K and Q that are shared, A_ij = softmax
    over j of K(f_i) . Q(f_j), unscaled; the part gets sum_j A_ij f_j.

    Attributes:
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool
    ) -> tuple[Float[Array, "B M h"], Float[Array, "B M M"]]:
        """The mixed vectors, and the attention A, whose rows sum to 1; at least float32."""
        edges = split_rows(x.shape[1])
        hidden = x.shape[-1] // 3
        if hidden < 1:
            raise UserError(
                f"the part-aware operation got {x.shape[-1]} channels and needs 3 or more; "
                "raise config.network.width"
            )
        wide = widen(x)
        parts = [wide[:, a:b].mean((1, 2)) for a, b in itertools.pairwise(edges)]
        f = Reduction(
            hidden,
            shared=False,
            use_bias=True,
            kernel_init=uniform_init,
            activation=lambda y: y,
            bn_axis_name=self.bn_axis_name,
            dtype=wide.dtype,
            name="local",
        )(nn.relu(jnp.stack(parts, axis=1)), train=train)
        key = nn.Dense(hidden, kernel_init=uniform_init, name="key")(f)
        query = nn.Dense(hidden, kernel_init=uniform_init, name="query")(f)
        attention = jax.nn.softmax(jnp.einsum("bih,bjh->bij", key, query), axis=-1)
        return jnp.einsum("bij,bjh->bih", attention, f), attention


def split_rows(height: int) -> list[int]:
    """Edges of the four parts of a map: part i ends before row floor((i + 1) H / 4).

    Raises:
        UserError: there are fewer rows than parts.
    """
    if height < PARTS:
        raise UserError(
            f"the part-aware operation got a map of {height} rows and splits it into {PARTS} "
            "parts; use higher images (config.input.height)"
        )
    return [i * height // PARTS for i in range(PARTS + 1)]


class Zero(Operation):
    """Nothing, "none": an edge that is not there."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 C"]:
        """Zeros."""
        return jnp.zeros_like(x[:, :: self.stride, :: self.stride])


# What an edge of a genotype may be. Modules with the fields of `Operation`.
OPERATIONS: dict[str, Callable[..., nn.Module]] = {
    "none": Zero,
    "max": functools.partial(Pool, kind="max"),
    "avg": functools.partial(Pool, kind="avg"),
    "sep": functools.partial(Separable, times=2),
    "dil": functools.partial(Separable, dilation=2),
    "skip": Skip,
    "part": PartAware,
}

"""Inception blocks (Szegedy et al., CVPR 2015): streams of convolutions side by side, concatenated.

Every convolution is followed by a batch normalization and a ReLU.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mros_jax.errors import UserError
from mros_jax.models.heads import uniform_init
from mros_jax.models.layers import max_pool, widen
from mros_jax.models.resnet import BatchNorm, Conv


class ConvUnit(nn.Module):
    """Convolution with bias, batch normalization, ReLU.

    Attributes:
        features: channels that come out.
        size: of the square kernel; padded by half of it.
        stride: of the convolution.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    features: int
    size: int = 1
    stride: int = 1
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool, groups: int = 1
    ) -> Float[Array, "B H2 W2 F"]:
        """Apply the three.

        Args:
            x: the maps.
            train: batch statistics (True) or running statistics (False).
            groups: the batch is so many batches one after the other, which are normalized, and
                move the running statistics, each by itself.
        """
        conv = Conv(
            self.features,
            self.size,
            self.stride,
            self.dtype,
            use_bias=True,
            kernel_init=uniform_init,
            name="conv",
        )
        bn = BatchNorm(axis_name=self.bn_axis_name, dtype=self.dtype, name="bn")
        y = conv(x)
        if not train or groups == 1:
            return nn.relu(bn(y, train=train))
        parts = [bn(part, train=train) for part in jnp.split(y, groups)]
        return nn.relu(jnp.concatenate(parts))


class Inception(nn.Module):
    """Four streams that keep the map's size, or three that halve it.

    With m = features / 4. Kept: three times a 1x1 and a 3x3 convolution to m channels each, and a
    3x3 mean with a 1x1 convolution to m. Halved: a 1x1 and a 3x3 convolution to m; a 1x1 and two
    3x3 to m; a 3x3 maximum with a 1x1 convolution to 2 m; the last 3x3 of each has stride 2.

    Attributes:
        features: channels that come out, a multiple of 4.
        halve: halve height and width.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    features: int
    halve: bool = False
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool, groups: int = 1
    ) -> Float[Array, "B H2 W2 F"]:
        """Apply the block; an odd height or width is halved upward.

        Args:
            x: the maps.
            train: batch statistics (True) or running statistics (False).
            groups: see `ConvUnit`.

        Raises:
            UserError: `features` is no multiple of 4.
        """
        if self.features < 4 or self.features % 4:
            raise UserError(
                f"an Inception block of {self.features} channels; expected a multiple of 4"
            )
        m = self.features // 4

        def block(y: Array, name: str, features: int = m, size: int = 1, stride: int = 1) -> Array:
            make = ConvUnit(features, size, stride, self.dtype, self.bn_axis_name, name=name)
            return make(y, train=train, groups=groups)

        if self.halve:
            short = block(block(x, "short_1"), "short_2", size=3, stride=2)
            long = block(block(x, "long_1"), "long_2", size=3)
            long = block(long, "long_3", size=3, stride=2)
            streams = [short, long, block(max_pool(x), "pool", features=2 * m)]
        else:
            streams = [block(block(x, f"chain{i}_1"), f"chain{i}_2", size=3) for i in (1, 2, 3)]
            streams.append(block(average_pool(x), "pool"))
        return jnp.concatenate(streams, axis=-1)


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Mean over 3x3 windows, stride 1; outside is 0 and counts."""
    y = jnp.pad(widen(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = y[:, :-2] + y[:, 1:-1] + y[:, 2:]
    y = y[:, :, :-2] + y[:, :, 1:-1] + y[:, :, 2:]
    return (y / 9).astype(x.dtype)

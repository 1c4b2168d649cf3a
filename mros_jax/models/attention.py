"""Attention over the channels of a map."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mros_jax.errors import UserError
from mros_jax.models.heads import uniform_init
from mros_jax.models.layers import widen


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a weight from 0 to 1 (Hu et al., CVPR 2018).

    The weights are computed from the means of all channels: a linear layer to fewer numbers, ReLU,
    a linear layer back, sigmoid. Both layers start as PyTorch's do.

    Attributes:
        ratio: of the channels to the numbers between the two layers.
    """

    ratio: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Weigh the channels.

        Raises:
            UserError: the ratio does not divide the channels.
        """
        channels = x.shape[-1]
        if self.ratio < 1 or channels % self.ratio:
            raise UserError(
                f"the attention's ratio is {self.ratio}; it must divide {channels} channels"
            )
        means = jnp.mean(widen(x), axis=(1, 2))
        squeezed = nn.relu(_make_linear(means, channels // self.ratio, "squeeze"))
        weights = nn.sigmoid(_make_linear(squeezed, channels, "excite"))  # (B, C)
        return x * weights[:, None, None].astype(x.dtype)


def _make_linear(x: Float[Array, "B C"], features: int, name: str) -> Float[Array, "B F"]:
    """A linear layer whose kernel and bias start within 1 / sqrt(inputs)."""
    limit = x.shape[-1] ** -0.5

    def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    y: Array = nn.Dense(features, kernel_init=uniform_init, bias_init=start, name=name)(x)
    return y

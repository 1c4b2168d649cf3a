"""DenseNet in Flax Linen with torchvision's arithmetic; every stage is returned by name.

Huang et al., "Densely connected convolutional networks" (CVPR 2017), with bottlenecks and
compression (DenseNet-BC). Module names are torchvision's, so that weights map one to one.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mros_jax.models.layers import widen
from mros_jax.models.resnet import BatchNorm, Conv, check_last_stride

# torchvision: kaiming_normal_()
_conv_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_BOTTLENECK = 4  # a layer's 1x1 convolution gives 4 times as many channels as its 3x3 one


class DenseNetSpec(NamedTuple):
    """What distinguishes one DenseNet from another, and the sizes that follow."""

    block_sizes: tuple[int, int, int, int]
    growth: int
    stem: int

    @property
    def smallest(self) -> str:
        """The name of the smallest DenseNet in `mros_jax.models.trunks.TRUNKS`."""
        return "tiny_densenet"

    def channels(self, level: str) -> int:
        """Channels of stage "t1" to "t4"."""
        channels = self.stem
        for stage in range(1, int(level[1]) + 1):
            channels = channels // 2 if stage > 1 else channels
            channels += self.block_sizes[stage - 1] * self.growth
        return channels

    def stride(self, level: str, last_stride: int = 1) -> int:
        """Pixels of the image for one of a stage's map."""
        check_last_stride(last_stride)
        return {"t1": 4, "t2": 8, "t3": 16, "t4": 16 * last_stride}[level]

    def activated(self, level: str) -> bool:
        """Whether a stage's map has passed a normalization and a ReLU: only the last has."""
        return level == "t4"

    def make(self, **fields: Any) -> "DenseNet":
        """The module; `fields` are the others of `DenseNet`."""
        return DenseNet(**fields, block_sizes=self.block_sizes, growth=self.growth, stem=self.stem)


class DenseNet(nn.Module):
    """A DenseNet trunk without its classifier; `DenseNetSpec.make` makes it.

    Attributes:
        block_sizes: layers of each dense block.
        growth: channels that a layer adds to its input.
        stem: channels of the first convolution.
        last_stride: of the fourth stage: 2 (ImageNet), or 1, without the pooling before it.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    block_sizes: tuple[int, int, int, int]
    growth: int
    stem: int
    last_stride: int = 1
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool
    ) -> dict[str, Float[Array, "B _ _ _"]]:
        """Compute the stages.

        Args:
            x: normalized images, channels last.
            train: batch statistics (True) or running statistics (False).

        Returns:
            The output of each dense block, `t1`..`t4`: (B, H/4, W/4, C) to
            (B, H/(16 last_stride), ...), in the compute dtype. `t4` is normalized and rectified;
            the others are not, as the layers after them do that.
        """
        check_last_stride(self.last_stride)
        features = _Features(
            self.block_sizes,
            self.growth,
            self.stem,
            self.last_stride,
            self.dtype,
            self.bn_axis_name,
            name="features",
        )
        return features(x, train=train)


class _Features(nn.Module):
    """All of a DenseNet but its classifier; a module of its own, for torchvision has it so."""

    block_sizes: tuple[int, int, int, int]
    growth: int
    stem: int
    last_stride: int
    dtype: Any
    bn_axis_name: str | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool
    ) -> dict[str, Float[Array, "B _ _ _"]]:
        common = {"dtype": self.dtype, "bn_axis_name": self.bn_axis_name}
        x = Conv(self.stem, 7, 2, self.dtype, kernel_init=_conv_init, name="conv0")(x)
        axis_name = self.bn_axis_name
        norm = BatchNorm(pool=True, axis_name=axis_name, dtype=self.dtype, name="norm0")
        x = nn.relu(norm(x, train=train))
        stages: dict[str, jax.Array] = {}
        for stage, size in enumerate(self.block_sizes, start=1):
            if stage > 1:
                transition = _Transition(name=f"transition{stage - 1}", **common)
                x = transition(x, train=train)
                x = x if stage == 4 and self.last_stride == 1 else _halve(x)
            x = _DenseBlock(size, self.growth, name=f"denseblock{stage}", **common)(x, train=train)
            stages[f"t{stage}"] = x
        norm = BatchNorm(axis_name=self.bn_axis_name, dtype=self.dtype, name="norm5")
        return {**stages, "t4": nn.relu(norm(x, train=train))}


class _DenseBlock(nn.Module):
    """Layers each of which sees the block's input and the outputs of all layers before it."""

    size: int
    growth: int
    dtype: Any
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W C2"]:
        for i in range(1, self.size + 1):
            layer = _DenseLayer(self.growth, self.dtype, self.bn_axis_name, name=f"denselayer{i}")
            x = jnp.concatenate([x, layer(x, train=train)], axis=-1)
        return x


class _DenseLayer(nn.Module):
    """Normalization, ReLU and convolution, 1x1 and then 3x3."""

    growth: int
    dtype: Any
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W F"]:
        for i, (features, size) in enumerate(
            ((_BOTTLENECK * self.growth, 1), (self.growth, 3)), start=1
        ):
            norm = BatchNorm(axis_name=self.bn_axis_name, dtype=self.dtype, name=f"norm{i}")
            x = nn.relu(norm(x, train=train))
            conv = Conv(features, size, 1, self.dtype, kernel_init=_conv_init, name=f"conv{i}")
            x = conv(x)
        return x


class _Transition(nn.Module):
    """Between two blocks: half the channels."""

    dtype: Any
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W F"]:
        norm = BatchNorm(axis_name=self.bn_axis_name, dtype=self.dtype, name="norm")
        x = nn.relu(norm(x, train=train))
        half = x.shape[-1] // 2
        return Conv(half, 1, 1, self.dtype, kernel_init=_conv_init, name="conv")(x)


def _halve(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """The mean of each 2x2 pixels; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    whole = widen(x[:, : 2 * rows, : 2 * columns])
    return whole.reshape(batch, rows, 2, columns, 2, channels).mean(axis=(2, 4)).astype(x.dtype)

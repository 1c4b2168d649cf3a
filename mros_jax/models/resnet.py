"""ResNet in Flax Linen with torchvision's arithmetic; every stage is returned by name.

He et al., "Deep residual learning for image recognition" (CVPR 2016), in the variant torchvision
trains (stride in the 3x3 convolution). Module names follow torchvision's, so that weights map one
to one (`mros_jax.models.torch_weights`).
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mros_jax.errors import UserError, check_choice
from mros_jax.models.layers import (
    convolve,
    count_values,
    max_pool,
    normalize,
    normalize_and_pool,
    widen,
)

Block = Literal["basic", "bottleneck"]
STEM_POOLS = ("centered", "end")
STRIDES = ("3x3", "1x1", "last")


class TrunkSpec(NamedTuple):
    """What distinguishes one ResNet from another, and the sizes that follow."""

    stage_sizes: tuple[int, int, int, int]
    width: int
    block: Block

    @property
    def smallest(self) -> str:
        """The name of the smallest ResNet in `mros_jax.models.trunks.TRUNKS`."""
        return "tiny"

    def channels(self, level: str) -> int:
        """Channels of stage "t1" to "t4"."""
        inner: int = self.width * 2 ** (int(level[1]) - 1)
        return 4 * inner if self.block == "bottleneck" else inner

    def stride(self, level: str, last_stride: int = 1) -> int:
        """Pixels of the image for one of a stage's map."""
        check_last_stride(last_stride)
        return {"t1": 4, "t2": 8, "t3": 16, "t4": 16 * last_stride}[level]

    def activated(self, level: str) -> bool:
        """Whether a stage's map has passed a normalization and a ReLU: all have."""
        return True

    def blocks(self) -> tuple[str, ...]:
        """The residual blocks in order, "layer1_0" to "layer4_2" for ResNet-50."""
        return tuple(
            f"layer{stage}_{i}"
            for stage, size in enumerate(self.stage_sizes, start=1)
            for i in range(size)
        )

    def make(self, **fields: Any) -> "ResNet":
        """The module, all blocks unless told otherwise; `fields` are the others of `ResNet`."""
        return ResNet(**{"blocks": self.blocks(), **fields}, width=self.width, block=self.block)


def check_last_stride(last_stride: int) -> None:
    """Refuse another stride of the last stage than 1 (re-identification) or 2 (ImageNet)."""
    if last_stride not in (1, 2):
        raise UserError(f"last_stride is {last_stride}; it must be 1 or 2")


def torchvision_name(path: tuple[str, ...]) -> str:
    """Name a module of a trunk as torchvision does: ("layer3_0", "conv1") -> "layer3.0.conv1"."""
    name = ".".join(path).replace("downsample_conv", "downsample.0")
    return re.sub(r"(layer\d+)_(\d+)", r"\1.\2", name.replace("downsample_bn", "downsample.1"))


# torchvision: kaiming_normal_(mode="fan_out", nonlinearity="relu")
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Square convolution, padded by kernel // 2; without bias, as every one in a ResNet is."""

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32
    use_bias: bool = False
    kernel_init: Any = _conv_init

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """Convolve; float32 parameters are cast to the compute dtype."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", self.kernel_init, shape, jnp.float32), self.dtype)
        y = convolve(x.astype(self.dtype), kernel, self.stride)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.asarray(bias, self.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalization with PyTorch's arithmetic, over all axes but the last `feature_axes`.

    Normalises with the biased variance and keeps the *unbiased* one as running statistic, with
    momentum 0.1 for the new value (Flax's own keeps the biased one). Statistics are float32.
    With `axis_name` they are those of the global batch of all devices on that axis. No gradient
    flows through running statistics. With `pool` the result is max-pooled, 3x3 with stride 2.
    """

    feature_axes: int = 1
    pool: bool = False
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Any = nn.initializers.ones
    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, train: bool) -> Float[Array, "..."]:
        """Normalise `x` with batch (train) or running (eval) statistics.

        Raises:
            ValueError: in training, if there is only one value per channel: no variance.
        """
        shape = x.shape[-self.feature_axes :]
        if self.use_scale:
            scale = jnp.asarray(self.param("scale", self.scale_init, shape, jnp.float32))
        else:
            scale = jnp.ones(shape, jnp.float32)
        if self.use_bias:
            bias = jnp.asarray(self.param("bias", nn.initializers.zeros, shape, jnp.float32))
        else:
            bias = jnp.zeros(shape, scale.dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if not train:
            mean, var = running_mean.value, running_var.value
            y = (widen(x) - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
            y = y.astype(self.dtype)
            return max_pool(y) if self.pool else y
        count = count_values(x, self.feature_axes, self.axis_name)
        if count < 2:
            raise ValueError(
                f"batch normalization in training got one value per channel (input {x.shape}); "
                "use a batch of two or more images, or train=False"
            )
        y, mean, var = (normalize_and_pool if self.pool else normalize)(
            x, scale, bias, lax.stop_gradient(running_mean.value), self.epsilon, self.axis_name
        )
        if not self.is_initializing():
            unbiased = var * (count / (count - 1))
            running_mean.value += self.momentum * (mean - running_mean.value)
            running_var.value += self.momentum * (unbiased - running_var.value)
        return y.astype(self.dtype)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions ("basic") or 1x1, 3x3, 1x1 with expansion 4 ("bottleneck").

    Attributes:
        width: channels of the 3x3 convolutions.
        block: which of the two.
        stride: of the block.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
        strides: where a bottleneck has it, and how its shortcut does, see `ResNet`.
    """

    width: int
    block: Block
    stride: int
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None
    strides: str = "3x3"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 F"]:
        """Apply the block: relu(shortcut + branch)."""

        def conv_bn(
            y: Array, features: int, size: int, stride: int, conv_name: str, bn_name: str
        ) -> Array:
            y = Conv(features, size, stride, self.dtype, name=conv_name)(y)
            bn = BatchNorm(axis_name=self.bn_axis_name, dtype=self.dtype, name=bn_name)
            return bn(y, train=train)

        if self.block == "basic":
            out = self.width
            y = nn.relu(conv_bn(x, self.width, 3, self.stride, "conv1", "bn1"))
            y = conv_bn(y, out, 3, 1, "conv2", "bn2")
        else:
            out = 4 * self.width
            first, second = (self.stride, 1) if self.strides == "1x1" else (1, self.stride)
            y = nn.relu(conv_bn(x, self.width, 1, first, "conv1", "bn1"))
            y = nn.relu(conv_bn(y, self.width, 3, second, "conv2", "bn2"))
            y = conv_bn(y, out, 1, 1, "conv3", "bn3")
        if self.strides == "last" and x.shape[-1] == out:
            x = x[:, :: self.stride, :: self.stride]
        elif self.stride != 1 or x.shape[-1] != out:
            x = conv_bn(x, out, 1, self.stride, "downsample_conv", "downsample_bn")
        return nn.relu(x + y)


class NonLocal(nn.Module):
    """Add to each place of a map what all places say of it (Wang et al., CVPR 2018).

    As the AGW baseline has it (Ye et al., TPAMI 2021): one inner channel; the weight of a pair of
    places is the product of two linear layers there, divided by the number of places; the last
    normalization starts at 0, so that the block starts as nothing.
    """

    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W C"]:
        """Apply the block."""
        batch, height, width, channels = x.shape

        def place_by_place(y: Array, features: int, name: str) -> Array:
            return Conv(features, 1, 1, self.dtype, use_bias=True, name=name)(y)

        theta, phi, g = (
            place_by_place(x, 1, name).reshape(batch, height * width)
            for name in ("theta", "phi", "g")
        )
        said = theta * jnp.sum(phi * g, axis=1, keepdims=True) / (height * width)
        y = place_by_place(said.reshape(batch, height, width, 1), channels, "out")
        norm = BatchNorm(
            scale_init=nn.initializers.zeros,
            axis_name=self.bn_axis_name,
            dtype=self.dtype,
            name="bn",
        )
        return x + norm(y, train=train)


class ResNet(nn.Module):
    """A ResNet trunk without its classifier, or a piece of one; `TrunkSpec.make` makes it.

    Attributes:
        blocks: names of the residual blocks, a run of `TrunkSpec.blocks`.
        stem: begin with the layers before the first block; without them the input is the map that
            the block before `blocks` gives.
        width: channels of the first stage's 3x3 convolutions; they double with every stage.
        block: "basic" (18, 34) or "bottleneck" (50, 101, 152).
        last_stride: stride of the fourth stage, 1 (usual in re-identification) or 2 (ImageNet).
        stem_relu: the ReLU after the first batch normalization, which some public code leaves out.
        stem_pool: the windows of the maximum after it begin one pixel outside of the map
            ("centered"), or with its first pixel, and reach over its end ("end": Caffe's,
            TensorFlow's and fast-reid's).
        strides: of a stage's first block, in the bottleneck's "3x3" convolution or in its first
            "1x1" one (as He et al. have it); "last": in the last block of the stage before, whose
            shortcut leaves out rows and columns (TF-Slim's).
        non_local: names of blocks that a `NonLocal` block follows.
        dtype: compute dtype; parameters and statistics stay float32.
        bn_axis_name: axis over which batch statistics are shared; None = each device its own.
    """

    blocks: Sequence[str]
    stem: bool = True
    width: int = 64
    block: Block = "bottleneck"
    last_stride: int = 1
    stem_relu: bool = True
    stem_pool: str = "centered"
    strides: str = "3x3"
    non_local: Sequence[str] = ()
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool
    ) -> dict[str, Float[Array, "B _ _ _"]]:
        """Compute the stages.

        Args:
            x: normalized images, channels last; or a map (see `stem`).
            train: batch statistics (True) or running statistics (False).

        Returns:
            The last output of each stage that `blocks` has, of `t1`..`t4`: (B, H/4, W/4, C) to
            (B, H/(16 last_stride), ...) for images, in the compute dtype.
        """
        check_last_stride(self.last_stride)
        check_choice("stem_pool", self.stem_pool, STEM_POOLS)
        check_choice("strides", self.strides, STRIDES)
        if self.stem:
            x = Conv(self.width, 7, 2, self.dtype, name="conv1")(x)
            centered = self.stem_pool == "centered"
            axis_name = self.bn_axis_name
            bn = BatchNorm(pool=centered, axis_name=axis_name, dtype=self.dtype, name="bn1")
            x = bn(x, train=train)
            x = x if centered else max_pool_to_end(x)
            x = nn.relu(x) if self.stem_relu else x  # after the pooling, where it gives the same
        stages: dict[str, jax.Array] = {}
        for name in self.blocks:
            stage, place = (int(number) for number in name.removeprefix("layer").split("_"))
            x = ResidualBlock(
                self.width * 2 ** (stage - 1),
                self.block,
                self._stride(stage, place),
                self.dtype,
                self.bn_axis_name,
                self.strides,
                name=name,
            )(x, train=train)
            if name in self.non_local:
                after = NonLocal(self.dtype, self.bn_axis_name, name=f"nonlocal_{name}")
                x = after(x, train=train)
            stages[f"t{stage}"] = x
        return stages

    def _stride(self, stage: int, place: int) -> int:
        """The stride of a block, by its place in its stage."""
        of_stage = (1, 2, 2, self.last_stride, 1)
        if self.strides != "last":
            return of_stage[stage - 1] if place == 0 else 1
        return 1 if f"layer{stage}_{place + 1}" in self.blocks else of_stage[stage]


def max_pool_to_end(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Maximum over 3x3 windows, stride 2; of an even size the last window reaches over the end."""
    pad = tuple((0, 1 - size % 2) for size in x.shape[1:3])
    largest: Array = nn.max_pool(x, (3, 3), (2, 2), padding=pad)
    return largest

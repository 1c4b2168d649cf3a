"""MROS: multi-resolution overlapping stripes network (Okay et al., 2019, arXiv 1910.12322)."""

from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mros_jax.models.resnet import BACKBONES, BatchNorm, ResNet
from mros_jax.models.stripes import pool_stripes

SettingName = Literal["I", "II", "III", "IV"]


class Setting(NamedTuple):
    """One row of the paper's Table 1."""

    levels: tuple[str, ...]
    overlap: bool
    local_metric: bool  # triplet and centre loss on each local g (True) or on G (False)


SETTINGS: dict[str, Setting] = {
    "I": Setting(("t4",), overlap=False, local_metric=True),
    "II": Setting(("t4",), overlap=True, local_metric=True),
    "III": Setting(("t4",), overlap=True, local_metric=False),
    "IV": Setting(("t3", "t4"), overlap=True, local_metric=False),
}


@flax.struct.dataclass
class MROSOutputs:
    """Everything the network computes, by name (attribute or `outputs["name"]`).

    Attributes:
        stages: t1..t4, (B, H, W, C) each, in the compute dtype.
        g: level -> (B, S, C) float32, pooled stripes.
        h: level -> (B, S, C) float32, `g` after its batch normalisation.
        logits: level -> (B, S, N) float32, one classifier per stripe and level.
        descriptor: G, (B, D) float32: all `g`, level t3 before t4, top stripe first.
    """

    stages: dict[str, Any]
    g: dict[str, Any]
    h: dict[str, Any]
    logits: dict[str, Any]
    descriptor: Any

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class StripeClassifiers(nn.Module):
    """One linear layer per stripe (paper, Eq. 3: with bias)."""

    num_classes: int

    @nn.compact
    def __call__(self, h: Float[Array, "B S C"]) -> Float[Array, "B S N"]:
        """Apply classifier l to stripe l."""
        _, stripes, channels = h.shape
        kernel = self.param(
            "kernel",
            nn.initializers.normal(0.001),  # as the BNNeck baseline (Luo et al., 2019) starts
            (stripes, channels, self.num_classes),
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (stripes, self.num_classes), jnp.float32)
        return jnp.einsum("bsc,scn->bsn", h, kernel) + bias


class MROS(nn.Module):
    """The whole network: ResNet, stripe pooling, batch-normalised heads.

    Attributes:
        num_classes: identities of the training set, N.
        setting: "I" to "IV", the rows of the paper's Table 1; IV is the complete MROS.
        backbone: a name in `mros_jax.models.resnet.BACKBONES`.
        num_stripes: s.
        last_stride: stride of the backbone's last stage, 1 or 2.
        neck_bias: learn the bias of the heads' batch normalisation; by default it is fixed at 0.
        dtype: compute dtype of the backbone; g, h, logits, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Example:
        >>> model = MROS(num_classes=751, setting="IV")
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 15360)
    """

    num_classes: int
    setting: str = "IV"
    backbone: str = "resnet50"
    num_stripes: int = 6
    last_stride: int = 1
    neck_bias: bool = False
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    def setup(self) -> None:
        """Check the fields and build the parts."""
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 1 or more")
        if self.setting not in SETTINGS:
            raise ValueError(
                f"setting is {self.setting!r}; it must be one of {get_args(SettingName)}"
            )
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone is {self.backbone!r}; it must be one of {tuple(BACKBONES)}")
        if self.last_stride not in (1, 2):
            raise ValueError(f"last_stride is {self.last_stride}; it must be 1 or 2")
        self.trunk = ResNet(
            **BACKBONES[self.backbone]._asdict(),
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="backbone",
        )
        levels = SETTINGS[self.setting].levels
        self.necks = {
            level: BatchNorm(
                feature_axes=2,
                use_bias=self.neck_bias,
                axis_name=self.bn_axis_name,
                dtype=jnp.promote_types(self.dtype, jnp.float32),
                name=f"neck_{level}",
            )
            for level in levels
        }
        self.classifiers = {
            level: StripeClassifiers(self.num_classes, name=f"classifier_{level}")
            for level in levels
        }

    def __call__(
        self, images: Shaped[np.ndarray | Array, "..."], *, train: bool = False
    ) -> MROSOutputs:
        """Compute all outputs.

        Args:
            images: (B, H, W, 3) float, normalised (see `mros_jax.data.augment`).
            train: batch statistics (True; apply with `mutable=["batch_stats"]`) or running ones.

        Returns:
            Named outputs; D = 15,360 for ResNet-50 in setting IV.

        Raises:
            ValueError: images of another rank, channel number or dtype, or of a height that does
                not give `num_stripes` equal stripes (names heights that do).
        """
        self._check(images)
        setting = SETTINGS[self.setting]
        stages = self.trunk(jnp.asarray(images), train=train)
        g, h, logits = {}, {}, {}
        for level in setting.levels:
            g[level] = pool_stripes(stages[level], self.num_stripes, setting.overlap)
            h[level] = self.necks[level](g[level], train=train)
            logits[level] = self.classifiers[level](h[level])
        batch = images.shape[0]
        # (B, S, C) -> (B, S * C) per level
        descriptor = jnp.concatenate([x.reshape(batch, -1) for x in g.values()], axis=-1)
        return MROSOutputs(stages=stages, g=g, h=h, logits=logits, descriptor=descriptor)

    def _check(self, images: Shaped[np.ndarray | Array, "..."]) -> None:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape}; expected (B, H, W, 3)")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype}; expected normalised floating point pixels "
                "(mros_jax.data.augment.preprocess makes them from uint8)"
            )
        for level in SETTINGS[self.setting].levels:
            stride = 16 * (self.last_stride if level == "t4" else 1)
            height = -(-images.shape[1] // stride)  # padded strides round up
            if height % self.num_stripes:
                unit = stride * self.num_stripes
                below = images.shape[1] // unit * unit
                work = [h for h in (below, below + unit) if h > 0]
                raise ValueError(
                    f"images of height {images.shape[1]} give a {level} of height {height}, which "
                    f"cannot be cut into {self.num_stripes} equal stripes; use images of height "
                    f"{' or '.join(map(str, work))} (multiples of {unit})"
                )

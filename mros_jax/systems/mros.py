"""MROS: multi-resolution overlapping stripes network (Okay et al., 2019, arXiv 1910.12322)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Classifiers
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import BatchNorm, torchvision_name
from mros_jax.models.stripes import check_height, pool_stripes, stripe_edges
from mros_jax.models.trunks import find_trunk


class MROS(nn.Module):
    """ResNet, stripe pooling, batch-normalized heads.

    The rows of the paper's Table 1 are values of these fields and of the objective, in
    `configs/mros.py`; the defaults are the complete MROS, row IV.

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        levels: stages of the trunk that are pooled, "t3" and "t4" (T3, T4).
        overlap: windows of two adjacent stripes, or single stripes.
        num_stripes: s.
        last_stride: stride of the trunk's last stage, 1 or 2.
        neck_bias: learn the bias of the heads' batch normalization; by default it is fixed at 0.
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "g_LEVEL" and "h_LEVEL", (B, S, C): pooled stripes, before and after their batch
            normalization. logits: "LEVEL". maps: "t1" to "t4". descriptor: G, all g, level t3
            before t4, top stripe first; 15,360 numbers with ResNet-50.

    Example:
        >>> model = MROS(num_classes=751)
        >>> variables = model.init(key, images, train=False)
        >>> model.apply(variables, images, train=False).descriptor  # (B, 15360)
    """

    num_classes: int
    trunk: str = "resnet50"
    levels: tuple[str, ...] = ("t3", "t4")
    overlap: bool = True
    num_stripes: int = 6
    last_stride: int = 1
    neck_bias: bool = False
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: Shaped[np.ndarray | Array, "..."],
        *,
        train: bool = False,
        keys: Key[Array, "B"] | None = None,
    ) -> Outputs:
        """Compute all outputs; see `mros_jax.models.outputs.Network`.

        Raises:
            UserError: fields that make no network; images of another rank, channel number or type,
                or of a height that does not give equal stripes (names heights that do).
        """
        spec = find_trunk(self.trunk)
        check_images(images)
        self._check(images.shape[1])
        trunk = spec.make(
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        embeddings: dict[str, Array] = {}
        logits: dict[str, Array] = {}
        for level in self.levels:
            g = pool_stripes(maps[level], self.num_stripes, self.overlap)
            neck = BatchNorm(
                feature_axes=2,
                use_bias=self.neck_bias,
                axis_name=self.bn_axis_name,
                dtype=jnp.promote_types(self.dtype, jnp.float32),
                name=f"neck_{level}",
            )
            h = neck(g, train=train)
            logits[level] = Classifiers(self.num_classes, name=f"classifier_{level}")(h)
            embeddings |= {f"g_{level}": g, f"h_{level}": h}
        # (B, S, C) -> (B, S * C) per level
        pooled = [embeddings[f"g_{level}"].reshape(images.shape[0], -1) for level in self.levels]
        return Outputs(jnp.concatenate(pooled, axis=-1), embeddings, logits, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """The stripes of each level."""
        spec = find_trunk(self.trunk)
        edges = stripe_edges(self.num_stripes, self.overlap)
        return tuple(
            Part(level, spec.channels(level), top, bottom)
            for level in self.levels
            for top, bottom in edges
        )

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None

    def _check(self, height: int) -> None:
        if self.num_classes < 1:
            raise UserError(f"num_classes is {self.num_classes}; it must be 1 or more")
        if not self.levels or not set(self.levels) <= {"t3", "t4"}:
            raise UserError(f"levels are {self.levels}; expected one or both of 't3', 't4'")
        spec = find_trunk(self.trunk)
        for level in self.levels:
            stride = spec.stride(level, self.last_stride)
            check_height(height, stride, self.num_stripes, level)

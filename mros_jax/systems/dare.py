"""DaRe: resource aware person re-identification (Wang et al., CVPR 2018, arXiv 1805.08805)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Reduction, uniform_init
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import BatchNorm, torchvision_name
from mros_jax.models.stripes import pool_stripes
from mros_jax.models.trunks import find_trunk

LEVELS = ("t1", "t2", "t3", "t4")


class DaRe(nn.Module):
    """An embedding of each stage of the trunk, and their sum with learned weights.

    Every stage is trained to be a descriptor by itself, so that a query that is easy may leave the
    network early. Nothing is classified, and the embeddings have any length.

    Attributes:
        num_classes: identities of the training set; no layer depends on it.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        last_stride: stride of the trunk's last stage, 1 or 2.
        reduced: numbers after the first linear layer of each stage.
        embedded: numbers of each embedding.
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "stage1" to "stage4" (B, 1, embedded), which are descriptors by themselves.
            logits: none. maps: "t1" to "t4". descriptor: their weighted sum.
    """

    num_classes: int
    trunk: str = "resnet50"
    last_stride: int = 2
    reduced: int = 1024
    embedded: int = 128
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
            UserError: fields that make no network; images of another rank, channel number or type.
        """
        check_images(images)
        if self.reduced < 1 or self.embedded < 1:
            raise UserError(
                f"reduced is {self.reduced} and embedded {self.embedded}; both must be 1 or more"
            )
        spec = find_trunk(self.trunk)
        trunk = spec.make(
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        stages: dict[str, Array] = {}
        for level in LEVELS:
            x = maps[level]
            if not spec.activated(level):
                norm = BatchNorm(
                    axis_name=self.bn_axis_name, dtype=self.dtype, name=f"norm_{level}"
                )
                x = nn.relu(norm(x, train=train))
            g = pool_stripes(x, 1, overlap=False)
            # Biases start at 0: of what follows, a normalization takes the first away, and no
            # distance sees the second.
            reduction = Reduction(
                self.reduced,
                shared=True,
                use_bias=True,
                kernel_init=uniform_init,
                bn_axis_name=self.bn_axis_name,
                dtype=g.dtype,
                name=f"reduction_{level}",
            )
            linear = nn.Dense(self.embedded, kernel_init=uniform_init, name=f"embedding_{level}")
            stages[level.replace("t", "stage")] = linear(reduction(g, train=train))
        weigh = nn.Dense(1, use_bias=False, kernel_init=uniform_init, name="fusion")
        by_stage = jnp.stack([e[:, 0] for e in stages.values()], axis=-1)  # (B, embedded, 4)
        return Outputs(weigh(by_stage)[..., 0], stages, {}, maps, exits=tuple(stages))

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """One part, the whole image."""
        return (Part("fused", self.embedded),)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None

"""TriNet: "In Defense of the Triplet Loss" (Hermans et al., 2017, arXiv 1703.07737)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Reduction
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import torchvision_name
from mros_jax.models.stripes import pool_stripes
from mros_jax.models.trunks import find_trunk_with


class TriNet(nn.Module):
    """ResNet and two linear layers; nothing is classified, and the embedding has any length.

    Attributes:
        num_classes: identities of the training set; no layer depends on it.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        last_stride: stride of the trunk's last stage, 1 or 2.
        stem_pool: of the ResNet, see `mros_jax.models.resnet.ResNet`.
        strides: of the ResNet, see `mros_jax.models.resnet.ResNet`.
        reduced: numbers after the first linear layer.
        embedded: numbers of the embedding.
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "g" (B, 1, C), the pooled feature, and "e" (B, 1, embedded). logits: none. maps:
            "t1" to "t4". descriptor: e.
    """

    num_classes: int
    trunk: str = "resnet50"
    last_stride: int = 2
    stem_pool: str = "centered"
    strides: str = "3x3"
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
        places = {"stem_pool": self.stem_pool, "strides": self.strides}
        spec, changed = find_trunk_with(self.trunk, places)
        trunk = spec.make(
            **changed,
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        g = pool_stripes(maps["t4"], 1, overlap=False)
        reduction = Reduction(
            self.reduced,
            shared=True,
            kernel_init=nn.initializers.glorot_uniform(),
            bn_axis_name=self.bn_axis_name,
            dtype=g.dtype,
            name="reduction",
        )
        orthogonal = nn.initializers.orthogonal()
        linear = nn.Dense(self.embedded, kernel_init=orthogonal, name="embedding")
        e = linear(reduction(g, train=train))
        return Outputs(e[:, 0], {"g": g, "e": e}, {}, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """One part, the whole image."""
        return (Part("e", self.embedded),)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None

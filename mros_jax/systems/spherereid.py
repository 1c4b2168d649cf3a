"""SphereReID: classification on a hypersphere (Fan et al., JVCIR 2019, arXiv 1807.00537)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import CosineClassifiers, dropout, to_unit_length
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import BatchNorm, torchvision_name
from mros_jax.models.stripes import pool_stripes
from mros_jax.models.trunks import find_trunk


class SphereReID(nn.Module):
    """ResNet, an embedding of unit length (network "D") and a classifier by cosine.

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        last_stride: stride of the trunk's last stage, 1 or 2.
        dropout: probability that a number before the embedding is set to 0 in training.
        embedded: numbers of the embedding.
        scale: s, of the cosines.
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "g" (B, 1, C), the pooled feature, and "e" (B, 1, embedded), of any length.
            logits: "e". maps: "t1" to "t4". descriptor: e divided by its norm.
    """

    num_classes: int
    trunk: str = "resnet50"
    last_stride: int = 2
    dropout: float = 0.5
    embedded: int = 1024
    scale: float = 14.0
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
        if self.embedded < 1 or self.scale <= 0:
            raise UserError(
                f"embedded is {self.embedded} and scale {self.scale}; both must be above 0"
            )
        trunk = find_trunk(self.trunk).make(
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        g = pool_stripes(maps["t4"], 1, overlap=False)

        def normalize(x: Array, name: str) -> Array:
            return BatchNorm(axis_name=self.bn_axis_name, dtype=x.dtype, name=name)(x, train=train)

        # Variance 1 / C, as PyTorch's kaiming_normal_(a=1)
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        linear = nn.Dense(self.embedded, kernel_init=kernel_init, name="embedding")
        kept = dropout(normalize(g, "neck"), self.dropout, keys, train=train)
        e = normalize(linear(kept), "embedding_bn")
        logits = CosineClassifiers(self.num_classes, self.scale, name="classifier")(e)
        return Outputs(to_unit_length(e[:, 0]), {"g": g, "e": e}, {"e": logits}, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """One part, the whole image."""
        return (Part("e", self.embedded),)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None

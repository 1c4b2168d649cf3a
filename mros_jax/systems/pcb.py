"""PCB: part-based convolutional baseline (Sun et al., ECCV 2018, arXiv 1711.09349)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import UserError
from mros_jax.models.heads import Classifiers, Reduction, dropout, to_unit_length
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import torchvision_name
from mros_jax.models.stripes import check_height, pool_stripes, stripe_edges
from mros_jax.models.trunks import find_trunk


class PCB(nn.Module):
    """ResNet cut into stripes, each of which is reduced and classified by itself.

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        num_stripes: p in the paper, S.
        last_stride: stride of the trunk's last stage, 1 or 2.
        dropout: probability that a number of g is set to 0 in training.
        reduced: numbers of each h, F.
        shared_embedding: one layer from g to h for all stripes, or one for each.
        embedding_bias: with a bias in those layers.
        descriptor: all "g", each divided by its norm, or all "h".
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "g" (B, S, C), the means of the stripes, and "h" (B, S, F), reduced. logits:
            "h". maps: "t1" to "t4". descriptor: the top stripe first; 12,288 numbers of g, or
            1,536 of h, with ResNet-50.
    """

    num_classes: int
    trunk: str = "resnet50"
    num_stripes: int = 6
    last_stride: int = 1
    dropout: float = 0.5
    reduced: int = 256
    shared_embedding: bool = True
    embedding_bias: bool = False
    descriptor: str = "g"
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
        check_images(images)
        self._check(images.shape[1])
        trunk = find_trunk(self.trunk).make(
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        g, more_maps = self._pool(maps["t4"], train=train, keys=keys)
        embedding = Reduction(
            self.reduced,
            shared=self.shared_embedding,
            use_bias=self.embedding_bias,
            bn_axis_name=self.bn_axis_name,
            dtype=g.dtype,
            name="embedding",
        )
        h = embedding(dropout(g, self.dropout, keys, train=train), train=train)
        logits = Classifiers(self.num_classes, name="classifier")(h)
        # (B, S, C) -> (B, S * C)
        described = to_unit_length(g) if self.descriptor == "g" else h
        descriptor = described.reshape(images.shape[0], -1)
        return Outputs(descriptor, {"g": g, "h": h}, {"h": logits}, {**maps, **more_maps})

    def _pool(
        self, t4: Array, *, train: bool, keys: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """The vectors g of the parts, (B, S, C), and what there is to look at beside the trunk."""
        return pool_stripes(t4, self.num_stripes, overlap=False), {}

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """The stripes."""
        of_g = self.descriptor == "g"
        size = find_trunk(self.trunk).channels("t4") if of_g else self.reduced
        edges = stripe_edges(self.num_stripes, overlap=False)
        return tuple(Part(self.descriptor, size, top, bottom) for top, bottom in edges)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights."""
        return torchvision_name(path[1:]) if path[0] == "trunk" else None

    def _check(self, height: int) -> None:
        if self.descriptor not in ("g", "h"):
            raise UserError(f"descriptor is {self.descriptor!r}; it must be 'g' or 'h'")
        if self.reduced < 1:
            raise UserError(f"reduced is {self.reduced}; it must be 1 or more")
        stride = find_trunk(self.trunk).stride("t4", self.last_stride)
        check_height(height, stride, self.num_stripes, "t4")

"""Strong baseline with a bag of tricks (Luo et al., 2019, arXiv 1903.07071)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from mros_jax.errors import check_choice
from mros_jax.models.heads import Classifiers, GeneralizedMean
from mros_jax.models.outputs import Outputs, Part, check_images
from mros_jax.models.resnet import BatchNorm, torchvision_name
from mros_jax.models.stripes import pool_stripes
from mros_jax.models.trunks import find_trunk, find_trunk_with


class StrongBaseline(nn.Module):
    """ResNet, global average pooling, BNNeck (Section 3.5) and one classifier.

    Attributes:
        num_classes: identities of the training set, N.
        trunk: a name in `mros_jax.models.trunks.TRUNKS`.
        last_stride: stride of the trunk's last stage, 1 or 2.
        stem_relu: with the ReLU after the trunk's first batch normalization; the authors' code,
            and so every number of the paper, is without it.
        stem_pool: of a ResNet, see `mros_jax.models.resnet.ResNet`.
        non_local: of a ResNet, see `mros_jax.models.resnet.ResNet`.
        pooling: of the trunk's last map, "mean" or "gem" (`GeneralizedMean`).
        neck: with the BNNeck; without it f_i is f_t, as in a plain baseline.
        head_bias: the classifier with a bias.
        descriptor: "f_i" or "f_t".
        dtype: compute dtype of the trunk; what follows, parameters and statistics are float32.
        bn_axis_name: axis of synchronised batch statistics (None: every device its own).

    Outputs:
        embeddings: "f_t" and "f_i", (B, 1, C): the pooled feature before and after its batch
            normalization. logits: "f_i". maps: "t1" to "t4". descriptor: f_i, or f_t; 2,048
            numbers with ResNet-50.
    """

    num_classes: int
    trunk: str = "resnet50"
    last_stride: int = 1
    stem_relu: bool = True
    stem_pool: str = "centered"
    non_local: tuple[str, ...] = ()
    pooling: str = "mean"
    neck: bool = True
    head_bias: bool = False
    descriptor: str = "f_i"
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
            UserError: an unknown trunk or another field that makes no network; images of another
                rank, channel number or type.
        """
        check_images(images)
        check_choice("pooling", self.pooling, ("mean", "gem"))
        check_choice("descriptor", self.descriptor, ("f_i", "f_t"))
        fields = {name: getattr(self, name) for name in ("stem_relu", "stem_pool", "non_local")}
        spec, changed = find_trunk_with(self.trunk, fields)
        trunk = spec.make(
            **changed,
            last_stride=self.last_stride,
            dtype=self.dtype,
            bn_axis_name=self.bn_axis_name,
            name="trunk",
        )
        maps = trunk(jnp.asarray(images), train=train)
        if self.pooling == "gem":
            f_t = GeneralizedMean(name="gem")(maps["t4"])[:, None]
        else:
            f_t = pool_stripes(maps["t4"], 1, overlap=False)
        f_i = f_t
        if self.neck:
            axis_name = self.bn_axis_name
            neck = BatchNorm(use_bias=False, axis_name=axis_name, dtype=f_t.dtype, name="neck")
            f_i = neck(f_t, train=train)
        logits = Classifiers(self.num_classes, self.head_bias, name="classifier")(f_i)
        embeddings = {"f_t": f_t, "f_i": f_i}
        return Outputs(embeddings[self.descriptor][:, 0], embeddings, {"f_i": logits}, maps)

    def parts(self, height: int, width: int) -> tuple[Part, ...]:
        """One part, the whole image."""
        return (Part(self.descriptor, find_trunk(self.trunk).channels("t4")),)

    def torchvision_name(self, path: tuple[str, ...]) -> str | None:
        """All of the trunk starts from ImageNet weights, but its non-local blocks."""
        if path[0] != "trunk" or path[1].startswith("nonlocal"):
            return None
        return torchvision_name(path[1:])

"""PCB with refined part pooling (Sun et al., ECCV 2018, arXiv 1711.09349, Section 3.3).

A stripe is a guess at a part. Here every column of the feature map is assigned to the parts by a
classifier, in shares, and a part is pooled over all columns. The classifier starts from a trained
PCB, so that the parts keep their order; training therefore has stages.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mros_jax.errors import UserError, check_choice
from mros_jax.models.heads import dropout
from mros_jax.models.layers import widen
from mros_jax.models.stripes import pool_stripes
from mros_jax.systems.pcb import PCB

CLASSIFIERS = ("paper", "authors")
_POOLINGS = ("stripes", "refined")
_GROUP = 8  # channels that the authors' classifier takes the mean of


class PCBRPP(PCB):
    """PCB whose parts are stripes or refined. The part classifier is there in both.

    Attributes:
        pooling: "stripes", as PCB does, or "refined", by the part classifier.
        part_classifier: "paper": a linear layer without bias; "authors": of their code, see
            `PartClassifier`.
        part_dropout: of the authors' part classifier: probability that a number of its input is
            set to 0 in training.
        temperature: what the part classifier's logits are multiplied by.

    Outputs:
        as PCB's; the map "parts" (B, H, W, S) has the shares of each column in the parts.
    """

    pooling: str = "refined"
    part_classifier: str = "paper"
    part_dropout: float = 0.0
    temperature: float = 1.0

    def _pool(
        self, t4: Array, *, train: bool, keys: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        check_choice("pooling", self.pooling, _POOLINGS)
        classifier = PartClassifier(
            self.num_stripes,
            kind=self.part_classifier,
            dropout=self.part_dropout,
            temperature=self.temperature,
            name="part_classifier",
        )
        parts = classifier(widen(t4), train=train, keys=keys)
        if self.pooling == "stripes":
            return pool_stripes(t4, self.num_stripes, overlap=False), {"parts": parts}
        return pool_parts(widen(t4), parts), {"parts": parts}


class PartClassifier(nn.Module):
    """The shares of each column of a feature map in the parts (Eq. 4): a softmax of logits.

    The "paper" has a linear layer without bias. The "authors" code drops numbers out, takes the
    mean of each 8 neighbouring channels, subtracts each channel's mean over the map, and has a
    linear layer with bias.

    Attributes:
        num_parts: S.
        kind: "paper" or "authors".
        dropout: before the layer, of "authors".
        temperature: what the logits are multiplied by.
    """

    num_parts: int
    kind: str = "paper"
    dropout: float = 0.0
    temperature: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool, keys: Key[Array, "B"] | None
    ) -> Float[Array, "B H W S"]:
        """Assign the columns; the S shares of a column add up to 1.

        Raises:
            UserError: another kind, or channels that do not make groups of 8.
        """
        check_choice("part_classifier", self.kind, CLASSIFIERS)
        authors = self.kind == "authors"
        if self.dropout and not authors:
            raise UserError(f"part_dropout is {self.dropout}; only the authors' classifier has one")
        init: Any = nn.initializers.normal(0.001)
        if authors:
            init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
            if x.shape[-1] % _GROUP:
                raise UserError(
                    f"the authors' part classifier needs a multiple of {_GROUP} channels; the "
                    f"trunk has {x.shape[-1]}"
                )
            # Another mask than that of g.
            x = dropout(x, self.dropout, keys, train=train, salt=1)
            x = jnp.mean(x.reshape(*x.shape[:-1], -1, _GROUP), axis=-1)
            x = x - jnp.mean(x, axis=(1, 2), keepdims=True)
        shape = (x.shape[-1], self.num_parts)
        logits = x @ self.param("kernel", init, shape, jnp.float32)
        if authors:
            logits += self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        return jax.nn.softmax(self.temperature * logits, axis=-1)


def pool_parts(
    features: Float[Array, "B H W C"], parts: Float[Array, "B H W S"]
) -> Float[Array, "B S C"]:
    """Pool each part over all columns: the mean of S times a column's share, times the column.

    The factor S makes g_i of columns that belong to one part alone, H * W / S of them to each, the
    mean of these, as `pool_stripes` has it; and of equal shares the mean of all columns.
    """
    _, height, width, count = parts.shape
    total = jnp.einsum("bhws,bhwc->bsc", parts, features)
    return total * (count / (height * width))

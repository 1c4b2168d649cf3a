"""Cross-entropy of pairs of images: the same identity, or another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mros_jax.losses.reduce import Scalar


def pair_cross_entropy(logits: Float[Array, "S R C 2"], same: Bool[Array, "R C"]) -> Scalar:
    """Mean cross-entropy of two classes over all pairs and all S logits of each.

    Args:
        logits: of "another identity" and of "the same", of each pair of a row and a column.
        same: whether the pair is of one identity.
    """
    lead = logits[..., 1] - logits[..., 0]
    return jnp.mean(jax.nn.softplus(jnp.where(same, -lead, lead)))

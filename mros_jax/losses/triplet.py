"""Triplet loss with the hardest examples of the batch."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mros_jax.losses.reduce import (
    Mask,
    Reduction,
    Scalar,
    check_batch,
    check_reduction,
    gather,
    keep,
    reduce,
)
from mros_jax.models.layers import widen


def batch_hard_triplet(
    features: Float[Array, "B D"],
    labels: Int[Array, "B"],
    *,
    margin: float | None = 0.3,
    reduction: Reduction = "mean",
    mask: Mask = None,
    axis_name: str | None = None,
) -> Scalar:
    """Triplet loss with the hardest positive and negative of the batch (paper, Eq. 1).

    Per anchor: max(0, margin + max_p ||a - p|| - min_n ||a - n||), Euclidean, not squared; where
    the distance is 0 its gradient is 0. An anchor is not its own positive. Anchors without a
    positive or without a negative, and masked examples, contribute nothing.

    Args:
        features: (B, D) descriptors.
        labels: (B,) identities.
        margin: of the hinge; None = soft margin, log(1 + exp(d_p - d_n)) (Hermans et al., 2017).
        reduction: "mean" over the valid anchors, or their "sum" (as Eq. 1 is written).
        mask: (B,), True where the example takes part.
        axis_name: mine over the global batch of this axis.

    Returns:
        The loss; 0 if no anchor is valid.

    Raises:
        UserError: shapes that do not fit, or another reduction.
    """
    check_batch(features, labels, mask, "features", rank=2)
    check_reduction(reduction)
    features, labels, mask = gather((features, labels, mask), axis_name)
    features = keep(widen(features), mask)
    positive, negative, valid = _mine(lax.stop_gradient(features), labels, mask)
    # Only mined pairs are measured, by their difference: no cancellation, no B x B gradient.
    hardest_positive = _distance(features, features[positive])
    hardest_negative = _distance(features, features[negative])
    gap = hardest_positive - hardest_negative
    loss = jax.nn.softplus(gap) if margin is None else jax.nn.relu(gap + margin)
    return reduce(loss, valid, reduction)


def _mine(
    features: Float[Array, "B D"], labels: Int[Array, "B"], mask: Mask
) -> tuple[Int[Array, "B"], Int[Array, "B"], Bool[Array, "B"]]:
    """Indices of each example's farthest positive and nearest negative, and whether it has both."""
    # Distances do not change with the origin; a near one keeps rounding errors small.
    x = features - jnp.mean(features, axis=0)
    norms = jnp.sum(jnp.square(x), axis=1)
    squared = norms[:, None] + norms[None, :] - 2 * jnp.matmul(x, x.T, precision="highest")
    same = labels[:, None] == labels[None, :]
    usable = jnp.ones_like(same) if mask is None else mask[:, None] & mask[None, :]
    positives = same & usable & ~jnp.eye(len(labels), dtype=bool)
    negatives = ~same & usable
    positive = jnp.argmax(jnp.where(positives, squared, -jnp.inf), axis=1)
    negative = jnp.argmin(jnp.where(negatives, squared, jnp.inf), axis=1)
    return positive, negative, positives.any(axis=1) & negatives.any(axis=1)


def _distance(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> Float[Array, "B"]:
    """Euclidean distance of rows; its gradient is 0 where it is 0 (two `where`: never NaN)."""
    squared = jnp.sum(jnp.square(a - b), axis=1)
    zero = squared == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))

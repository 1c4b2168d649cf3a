"""Center loss: descriptors near the center of their identity."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mros_jax.errors import UserError
from mros_jax.losses.reduce import (
    Mask,
    Reduction,
    Scalar,
    check_batch,
    check_reduction,
    gather,
    index_of,
    keep,
    reduce,
)
from mros_jax.models.layers import widen


def center_loss(
    features: Float[Array, "B D"],
    labels: Int[Array, "B"],
    centers: Float[Array, "N D"],
    *,
    reduction: Reduction = "mean",
    mask: Mask = None,
    axis_name: str | None = None,
) -> Scalar:
    """Squared distance of each descriptor to the center of its identity (paper, Eq. 2).

    Args:
        features: (B, D) descriptors.
        labels: (B,) identities, 0..N-1; another value gives NaN (see `check_labels`).
        centers: (N, D).
        reduction: "mean" of the squared distances (what public code computes), or half their
            "sum" (as Eq. 2 is written).
        mask: (B,), True where the example takes part.
        axis_name: reduce over the global batch of this axis.

    Returns:
        The loss; 0 if every example is masked.

    Raises:
        UserError: shapes that do not fit, or another reduction.
    """
    check_batch(features, labels, mask, "features", rank=2)
    check_reduction(reduction)
    if centers.ndim != 2 or centers.shape[1] != features.shape[1]:
        raise UserError(
            f"centers have shape {centers.shape}; expected (N, {features.shape[1]}) for features "
            f"of shape {features.shape}"
        )
    features, labels, mask = gather((features, labels, mask), axis_name)
    own = _take_rows(widen(centers), labels, mask)  # (B, D)
    squared = jnp.sum(jnp.square(keep(widen(features), mask) - own), axis=1)
    loss = reduce(squared, mask, reduction)
    return loss if reduction == "mean" else loss / 2


def _take_rows(
    rows: Float[Array, "N D"], labels: Int[Array, "B"], mask: Mask
) -> Float[Array, "B D"]:
    index = index_of(labels, mask, len(rows))
    return keep(rows.at[index].get(mode="fill", fill_value=jnp.nan), mask)

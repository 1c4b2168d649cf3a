"""Cross-entropy of classifiers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mros_jax.errors import UserError
from mros_jax.losses.reduce import (
    Mask,
    Scalar,
    check_batch,
    check_share,
    index_of,
    keep,
    mean_of_worst,
    reduce,
)
from mros_jax.models.layers import widen


def smoothed_cross_entropy(
    logits: Float[Array, "B *heads N"],
    labels: Int[Array, "B"],
    *,
    smoothing: float = 0.1,
    share: float = 1.0,
    mask: Mask = None,
    axis_name: str | None = None,
) -> Scalar:
    """Cross-entropy with label smoothing, (1 - eps) * onehot + eps / N (paper, Eq. 3 and 4).

    Args:
        logits: (B, N) or (B, S, N): the mean is taken over examples and heads.
        labels: (B,) identities, 0..N-1; another value gives NaN (see `check_labels`).
        smoothing: eps, from 0 to 1.
        share: take the mean over this share of the examples, those with the largest loss.
        mask: (B,), True where the example takes part.
        axis_name: mean over the global batch of this axis.

    Returns:
        The loss; 0 if every example is masked.

    Raises:
        UserError: shapes that do not fit, or eps or share out of range.
    """
    check_batch(logits, labels, mask, "logits")
    if not 0 <= smoothing <= 1:
        raise UserError(f"smoothing is {smoothing}; it must be from 0 to 1")
    check_share(share)
    log_p = jax.nn.log_softmax(keep(widen(logits), mask), axis=-1)
    log_p = log_p.reshape(log_p.shape[0], -1, log_p.shape[-1])  # (B, S, N)
    index = index_of(labels, mask, log_p.shape[-1])[:, None, None]
    own = jnp.take_along_axis(log_p, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    loss = -(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1)  # (B, S)
    loss = jnp.mean(loss, axis=1)
    if share < 1:
        return mean_of_worst(loss, mask, share, axis_name)
    # Logits are not gathered: sums of scalars are enough here.
    return reduce(loss, mask, "mean", axis_name)

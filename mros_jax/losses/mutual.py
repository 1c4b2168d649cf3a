"""Classifiers that learn from each other."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mros_jax.errors import UserError
from mros_jax.losses.reduce import Scalar, reduce
from mros_jax.models.layers import widen


def mutual_divergence(logits: Float[Array, "B S N"], *, axis_name: str | None = None) -> Scalar:
    """Mean over ordered pairs of classifiers of KL(p_i || p_j) (Zhang et al., CVPR 2018, Eq. 5).

    p_i is what classifier i says of an example. It is a target there, without a gradient: every
    classifier learns from all others, and none teaches by what it changes.

    Args:
        logits: (B, S, N), S of 2 or more classifiers.
        axis_name: mean over the global batch of this axis.

    Raises:
        UserError: another shape, or one classifier alone.
    """
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise UserError(
            f"logits have shape {logits.shape}; expected (B, S, N) with S of 2 or more classifiers"
        )
    log_p = jax.nn.log_softmax(widen(logits), axis=-1)
    targets = lax.stop_gradient(log_p)[:, :, None]  # (B, S, 1, N)
    pairs = jnp.sum(jnp.exp(targets) * (targets - log_p[:, None]), axis=-1)  # (B, S, S)
    count = logits.shape[1] * (logits.shape[1] - 1)  # the diagonal is 0
    return reduce(jnp.sum(pairs, axis=(1, 2)) / count, None, "mean", axis_name)

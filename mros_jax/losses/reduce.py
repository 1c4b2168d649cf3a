"""What the losses share: global batches, masks, reductions, and checks of what comes in."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from mros_jax.errors import UserError

Reduction = Literal["mean", "sum"]
Scalar = Float[Array, ""]
Mask = Bool[Array, "B"] | None


def reduce(
    losses: Float[Array, "B"], valid: Mask, reduction: Reduction, axis_name: str | None = None
) -> Scalar:
    """Mean or sum over the valid examples of all devices of the axis; 0 where there are none."""
    valid = jnp.ones(losses.shape, bool) if valid is None else valid
    total, count = jnp.sum(jnp.where(valid, losses, 0.0)), jnp.sum(valid)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1) if reduction == "mean" else total


def mean_of_worst(
    losses: Float[Array, "B"], valid: Mask, share: float, axis_name: str | None = None
) -> Scalar:
    """Mean of the largest losses among the valid examples of all devices of the axis.

    Args:
        losses: of each example.
        valid: True where it takes part; None: all do.
        share: of the valid examples, above 0 and to 1: of 64 the worst 0.8 are 51, one at least.
        axis_name: of the devices that share the batch.
    """
    if axis_name is not None:
        losses, valid = jax.tree.map(
            lambda x: lax.all_gather(x, axis_name, axis=0, tiled=True), (losses, valid)
        )
    valid = jnp.ones(losses.shape, bool) if valid is None else valid
    # Rounded up where only float32 keeps a product below a whole number.
    count = jnp.floor(share * jnp.sum(valid) + 1e-3).astype(jnp.int32)
    ascending = jnp.sort(jnp.where(valid, losses, -jnp.inf))  # NaN at the end: it is kept
    places = jnp.arange(len(losses), 0, -1)  # 1: the worst
    worst = (places <= jnp.maximum(count, 1)) & (places <= jnp.sum(valid))
    return reduce(keep(ascending, worst), worst, "mean")


def keep(x: Float[Array, "B *rest"], mask: Mask) -> Float[Array, "B *rest"]:
    """Zero in place of masked examples, so that a NaN there spoils neither value nor gradient."""
    return x if mask is None else jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def index_of(labels: Int[Array, "B"], mask: Mask, num_classes: int) -> Int[Array, "B"]:
    """Masked labels as 0; negative ones as N, which `fill` turns into NaN (they would wrap)."""
    labels = labels if mask is None else jnp.where(mask, labels, 0)
    return jnp.where(labels < 0, num_classes, labels)


def gather(
    arrays: tuple[Array, Array, Array | None], axis_name: str | None
) -> tuple[Array, Array, Array | None]:
    """The global batch of all devices of the axis, on each of them."""
    if axis_name is None:
        return arrays
    whole: tuple[Array, Array, Array | None] = jax.tree.map(
        lambda x: lax.all_gather(x, axis_name, axis=0, tiled=True), arrays
    )
    return whole


def check_batch(
    values: Array, labels: Array, mask: Mask, name: str, rank: int | None = None
) -> None:
    """Refuse arrays whose shapes do not fit each other."""
    if values.ndim < 2 or (rank is not None and values.ndim != rank):
        raise UserError(f"{name} have shape {values.shape}; expected {rank or '2 or more'} axes")
    if labels.shape != values.shape[:1]:
        raise UserError(f"labels have shape {labels.shape}; expected {values.shape[:1]}")
    if mask is not None and mask.shape != labels.shape:
        raise UserError(f"mask has shape {mask.shape}; expected {labels.shape}")


def check_reduction(reduction: str) -> None:
    """Refuse what is neither "mean" nor "sum"."""
    if reduction not in ("mean", "sum"):
        raise UserError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")


def check_share(share: float) -> None:
    """Refuse what is no share of a batch."""
    if not 0 < share <= 1:
        raise UserError(f"share is {share}; it must be above 0 and at most 1")


def check_labels(labels: Shaped[np.ndarray | Array, "..."], num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1; on the host, where compiled code cannot raise.

    Raises:
        UserError: naming the first bad label and its place.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise UserError(f"labels are {labels.dtype}; expected whole numbers (int32)")
    bad = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise UserError(
            f"label {labels[first]} at {first if len(first) > 1 else first[0]} is not in "
            f"0..{num_classes - 1} ({len(bad)} bad of {labels.size}); "
            f"relabel the identities, or set num_classes to what they are"
        )

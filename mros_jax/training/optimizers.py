"""Learning-rate schedule, optax chain and the update of the class centres."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def make_schedule(
    *,
    lr: float | int = 1e-3,
    steps_per_epoch: int,
    warmup_epochs: int = 10,
    warmup_factor: float | int = 0.01,
    warmup_per: Literal["epoch", "iteration"] = "epoch",
    milestones: Sequence[int] = (30, 60, 90),
    decay: float | int = 0.1,
) -> Schedule:
    """Make the paper's learning rate: linear warm-up, then steps down.

    In warm-up, epoch e (from 0) runs at lr * (warmup_factor * (1 - e/E) + e/E), E =
    `warmup_epochs`; per "iteration" e is the fractional epoch. From each epoch in `milestones` on,
    the rate is multiplied by `decay`.

    Args:
        lr: the rate after warm-up (1e-3 in the paper).
        steps_per_epoch: training steps (batches) in an epoch.
        warmup_epochs: E; 0 = no warm-up.
        warmup_factor: first epoch's share of the rate.
        warmup_per: the rate changes with every "epoch" or every "iteration" of the warm-up.
        milestones: increasing epochs, counted from 0.
        decay: factor at each of them.

    Returns:
        Function of the integer training step, usable under `jit`.

    Raises:
        ValueError: numbers that make no schedule.
    """
    milestones = tuple(int(m) for m in milestones)
    if lr <= 0 or steps_per_epoch < 1 or warmup_epochs < 0:
        raise ValueError(
            f"lr {lr} must be above 0, steps_per_epoch {steps_per_epoch} at least 1 and "
            f"warmup_epochs {warmup_epochs} at least 0"
        )
    if list(milestones) != sorted(set(milestones)) or any(m < 1 for m in milestones):
        raise ValueError(f"milestones {milestones} must be increasing epochs of 1 or more")
    if not 0 < warmup_factor <= 1 or not 0 < decay <= 1:
        raise ValueError(
            f"warmup_factor {warmup_factor} and decay {decay} must be above 0 and at most 1"
        )
    if warmup_per not in ("epoch", "iteration"):
        raise ValueError(f"warmup_per is {warmup_per!r}; it must be 'epoch' or 'iteration'")

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        epoch = step // steps_per_epoch
        passed = jnp.sum(epoch >= jnp.array(milestones, jnp.int32))
        # A table, not a power: exactly lr * decay**n in float32.
        levels = np.float32(lr) * np.float32(decay) ** np.arange(len(milestones) + 1)
        rate = jnp.asarray(levels, jnp.float32)[passed]
        if warmup_epochs == 0:
            return rate
        done = epoch if warmup_per == "epoch" else step / steps_per_epoch
        progress = jnp.minimum(done / warmup_epochs, 1.0).astype(jnp.float32)
        return rate * (warmup_factor * (1 - progress) + progress)

    return schedule


def make_optimizer(
    schedule: Schedule,
    *,
    name: Literal["adam", "adamw"] = "adam",
    weight_decay: float | int = 5e-4,
    decay_norm_and_bias: bool = True,
    clip_norm: float | int | None = None,
    accumulate_steps: int = 1,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
    eps: float | int = 1e-8,
) -> optax.GradientTransformation:
    """Make the optimiser as an optax chain.

    "adam" adds weight_decay * parameter to the gradient before the moments, as PyTorch's
    `Adam(weight_decay=...)` does and the paper used; "adamw" decays the parameter directly
    (Loshchilov & Hutter, 2019).

    Args:
        schedule: learning rate by training step (`make_schedule`). With accumulation it is still
            asked for the training step, not for the number of updates.
        name: "adam" or "adamw".
        weight_decay: strength of the L2 term or of the decay.
        decay_norm_and_bias: decay all parameters (PyTorch's default), or only kernels.
        clip_norm: clip the global norm of the gradient (before weight decay) to this; None = off.
        accumulate_steps: average the gradients of this many training steps into one update.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.

    Returns:
        An optax transformation; `update` needs the parameters.

    Raises:
        ValueError: another name, or numbers out of range.
    """
    if name not in ("adam", "adamw"):
        raise ValueError(f"optimizer name is {name!r}; it must be 'adam' or 'adamw'")
    if weight_decay < 0 or (clip_norm is not None and clip_norm <= 0):
        raise ValueError(
            f"weight_decay {weight_decay} must not be negative and clip_norm {clip_norm} must be "
            "above 0 (None = no clipping)"
        )
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps is {accumulate_steps}; it must be 1 or more")

    def rate(count: Int[Array, ""]) -> Float[Array, ""]:
        # `count` counts updates; each happens in the last training step of its group.
        return schedule(count * accumulate_steps + (accumulate_steps - 1))

    clip = [] if clip_norm is None else [optax.clip_by_global_norm(float(clip_norm))]
    mask = None if decay_norm_and_bias else is_kernel
    decay = optax.add_decayed_weights(float(weight_decay), mask)
    adam = optax.scale_by_adam(b1=float(b1), b2=float(b2), eps=float(eps))
    moments = [decay, adam] if name == "adam" else [adam, decay]
    chain = optax.chain(*clip, *moments, optax.scale_by_learning_rate(rate))
    if accumulate_steps == 1:
        return chain
    return optax.MultiSteps(chain, accumulate_steps).gradient_transformation()


def is_kernel(params: Any) -> Any:
    """Tell, for each parameter of a tree, whether it is a convolution's or classifier's kernel."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def update_centers(
    centers: Float[Array, "M N D"], gradient: Float[Array, "M N D"], *, lr: float | int = 0.5
) -> Float[Array, "M N D"]:
    """One step of plain SGD on the class centres.

    Args:
        centers: of `losses.init_centers`.
        gradient: of the centre loss *before* it is weighted by beta (`losses.center_gradient`).
        lr: rate; 0.5 in the public code of this loss.
    """
    return centers - lr * gradient

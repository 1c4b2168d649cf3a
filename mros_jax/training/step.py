"""What one step does: augment, forward, losses, gradients, update. Written for one device.

The step runs under the named axis `parallel.AXIS`. Each device sees its share of the global batch;
descriptors are gathered so that the losses see the whole of it, gradients are averaged, and the
state that comes out is the same on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mros_jax import losses
from mros_jax.data import augment
from mros_jax.parallel import AXIS
from mros_jax.training.optimizers import update_centers
from mros_jax.training.state import TrainState


def _from_first_device(tree: Any) -> Any:
    """The values of device 0 on every device, as DataParallel keeps its first replica's buffers."""
    first = jax.lax.axis_index(AXIS) == 0
    return jax.lax.psum(jax.tree.map(lambda x: jnp.where(first, x, 0), tree), AXIS)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    augmentation: dict[str, Any],
    beta: float,
    loss: dict[str, Any],
    center_lr: float,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, data, batch) -> (state, metrics)` for one device of the axis `AXIS`.

    Args:
        model: the network; its `bn_axis_name` decides whether batch statistics are per device.
        optimizer: the optax chain, which holds the learning rate.
        schedule: step -> learning rate, for the log.
        seed: of the run; with step and position in the global batch it makes the augmentation.
        augmentation: keyword arguments of `augment.augment_batch`.
        beta: weight of the centre loss for the network; the centres see it unweighted.
        loss: the other keyword arguments of `losses.mros_loss`.
        center_lr: rate of the centres' plain SGD.
        ema_decay: decay of the parameters' moving average, where the state keeps one.

    Returns:
        The step. `data` is `{"images": (N, h, w, 3) uint8, "labels": (N,)}` and `batch`
        `{"indices": (b,)}`; or `data` is None and `batch` holds `images` and `labels` themselves.
        Metrics are scalars: loss, its parts, grad_norm, lr.
    """

    def step(state: TrainState, data: Any, batch: Any):
        if data is None:
            images, labels = batch["images"], batch["labels"]
        else:
            images, labels = (data[name][batch["indices"]] for name in ("images", "labels"))
        share = images.shape[0]
        positions = jax.lax.axis_index(AXIS) * share + jnp.arange(share)
        keys = augment.example_keys(seed, state.step, positions)
        images = augment.augment_batch(images, keys, **augmentation)

        def loss_fn(params):
            outputs, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            total, parts = losses.mros_loss(
                outputs, labels, state.centers, axis_name=AXIS, beta=beta, **loss
            )
            return total, (parts, outputs, updated["batch_stats"])

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (total, (parts, outputs, batch_stats)), grads = grad_fn(state.params)
        grads = jax.lax.pmean(grads, AXIS)
        center_grads = losses.center_gradient(
            outputs,
            labels,
            state.centers,
            setting=loss["setting"],
            center_reduction=loss["center_reduction"],
            axis_name=AXIS,
        )

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=_from_first_device(batch_stats),
            opt_state=opt_state,
            centers=update_centers(state.centers, center_grads, lr=center_lr),
            ema_params=ema_params,
        )
        metrics = {"loss": total, **parts, "grad_norm": optax.tree.norm(grads)}
        metrics["lr"] = schedule(state.step)
        return new_state, metrics

    return step

"""What one step does: augment, forward, losses, gradients, update. Written for one device.

The step runs under the named axis `parallel.AXIS`. Each device sees its share of the global batch;
descriptors are gathered so that the losses see the whole of it, gradients are averaged, and the
state that comes out is the same on every device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mros_jax.data.augment import example_keys
from mros_jax.losses import Objective
from mros_jax.models.outputs import Network
from mros_jax.parallel import AXIS
from mros_jax.training.state import TrainState

Augment = Callable[[jax.Array, jax.Array], jax.Array]  # (images, keys) -> normalized images
Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]

_DROPOUT = 1  # folded into an example's key for dropout; augmentation uses the key itself


def _from_first_device(tree: Any) -> Any:
    """The values of device 0 on every device, as DataParallel keeps its first replica's buffers."""
    first = jax.lax.axis_index(AXIS) == 0
    return jax.lax.psum(jax.tree.map(lambda x: jnp.where(first, x, 0), tree), AXIS)


def make_train_step(
    network: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    augment: Augment,
    seed: int,
    schedules: Mapping[str, optax.Schedule] | None = None,
    ema_decay: float = 0.0,
    freeze: Callable[[Any], Any] = lambda params: params,
) -> Step:
    """Builds `step(state, data, batch) -> (state, metrics)` for one device of the axis `AXIS`.

    Args:
        network: its `bn_axis_name` decides whether batch statistics are per device.
        objective: what it is trained for.
        optimizer: the optax chain of `optimizers.make_optimizer`.
        augment: (images, keys) -> normalized images; one key an example.
        seed: of the run; with step and position in the global batch it makes the keys.
        schedules: group of parameters -> learning rate by step, for the log.
        ema_decay: decay of the parameters' moving average, where the state keeps one.
        freeze: params -> the same, cut off from the gradient where they do not move.

    Returns:
        The step. `data` has the `images` (N, h, w, 3) uint8 and their `labels` (N,), and `batch`
        `indices` (b,) into them; or `data` is None and `batch` has images and labels themselves.
        Metrics are scalars: `loss`, the unweighted `loss/TERM`, `grad_norm` of the network, and
        `lr/GROUP`.
    """

    def step(state: TrainState, data: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if data is None:
            images, labels = batch["images"], batch["labels"]
        else:
            images, labels = (data[name][batch["indices"]] for name in ("images", "labels"))
        share = images.shape[0]
        positions = jax.lax.axis_index(AXIS) * share + jnp.arange(share)
        keys = example_keys(seed, state.step, positions)
        images = augment(images, keys)
        dropout_keys = jax.vmap(lambda key: jax.random.fold_in(key, _DROPOUT))(keys)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            params = freeze(params)
            outputs, updated = network.apply(
                {"params": params["network"], "batch_stats": state.batch_stats},
                images,
                train=True,
                keys=dropout_keys,
                mutable=["batch_stats"],
            )
            total, terms = objective(params["objective"], outputs, labels, axis_name=AXIS)
            return total, (terms, updated.get("batch_stats", {}))

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (total, (terms, batch_stats)), grads = grad_fn(state.params)
        grads = jax.lax.pmean(grads, AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params["network"], ema_params, 1 - ema_decay)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=_from_first_device(batch_stats),
            opt_state=opt_state,
            ema_params=ema_params,
        )
        metrics = {
            "loss": total,
            **{f"loss/{name}": value for name, value in terms.items()},
            "grad_norm": optax.tree.norm(grads["network"]),
            **{f"lr/{name}": rate(state.step) for name, rate in (schedules or {}).items()},
        }
        return new_state, metrics

    return step

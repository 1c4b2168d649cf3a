"""All that a training step changes, as one pytree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

if TYPE_CHECKING:
    Scalar = jax.Array
    Tree = dict[str, Any]
else:
    # Trees of shapes, of shardings and of None pass through the same class.
    Scalar = Tree = Any


@flax.struct.dataclass
class TrainState:
    """Parameters, statistics and optimizer after `step` steps.

    Nothing random is stored: batches and augmentation derive from the seed and the step.

    Attributes:
        step: number of completed steps, int32 scalar.
        params: {"network": the network's parameters, "objective": those of the loss terms, such as
            centers, by term}, float32.
        batch_stats: running statistics of batch normalization, float32.
        opt_state: the optax chain's state.
        ema_params: exponential moving average of the network's parameters, or None where it is off.
    """

    step: Scalar
    params: Tree
    batch_stats: Tree
    opt_state: Any
    ema_params: Tree | None = None

    @property
    def eval_variables(self) -> Tree:
        """The variables that a trained network is evaluated with."""
        params = self.params["network"] if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def make_state(
    variables: Tree,
    objective_params: Tree,
    optimizer: optax.GradientTransformation,
    *,
    use_ema: bool = False,
) -> TrainState:
    """The state before the first step, as NumPy arrays.

    Args:
        variables: `{"params": ..., "batch_stats": ...}` of the network.
        objective_params: of `Objective.init`.
        optimizer: the chain whose state is initialized.
        use_ema: keep a moving average of the network's parameters, started from their initial
            values.
    """
    params = {"network": variables["params"], "objective": objective_params}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=jax.jit(optimizer.init)(params),  # eagerly, a program for every shape
        ema_params=variables["params"] if use_ema else None,
    )
    on_host: TrainState = jax.tree.map(np.asarray, state)
    return on_host

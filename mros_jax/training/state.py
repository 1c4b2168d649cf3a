"""All that a training step changes, as one pytree."""

from typing import Any

import flax.struct
import jax
import numpy as np
import optax


@flax.struct.dataclass
class TrainState:
    """Parameters, statistics, optimiser and centres after `step` steps.

    Nothing random is stored: batches and augmentation derive from the seed and the step.

    Attributes:
        step: number of completed steps, int32 scalar.
        params: the model's parameters, float32.
        batch_stats: running statistics of batch normalisation, float32.
        opt_state: the optax chain's state.
        centers: class centres of the centre loss.
        ema_params: exponential moving average of `params`, or None where it is off.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    centers: Any
    ema_params: Any = None

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that a trained model is evaluated with."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def make_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    centers: Any,
    *,
    use_ema: bool = False,
) -> TrainState:
    """The state before the first step, as NumPy arrays.

    Args:
        variables: `{"params": ..., "batch_stats": ...}` of the model.
        optimizer: the chain whose state is initialised.
        centers: initial class centres.
        use_ema: keep a moving average of the parameters, started from their initial values.
    """
    params = variables["params"]
    state = TrainState(
        step=np.zeros((), np.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        centers=centers,
        ema_params=params if use_ema else None,
    )
    return jax.tree.map(np.asarray, state)

"""What comparisons with PyTorch and with what it gave before share. Nothing here needs PyTorch."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from mros_jax.config import make_network, read, split_stages
from mros_jax.losses import make_objective
from mros_jax.training.optimizers import make_groups, make_optimizer, make_schedules

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
HEIGHT, WIDTH = 96, 32
NUM_CLASSES = 7
LABELS = np.repeat(np.arange(4), 4).astype(np.int32) + 1


def difference(a, b, floor=1e-30):
    """max |a - b| / max |b|, or / `floor` where that is more."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / max(np.abs(b).max(), floor)


def make_images(batch, height, width, seed=0):
    """Noise on stripes of colour, with another contrast in each image: (B, H, W, 3)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, height, width, 3)) * rng.uniform(0.1, 1, (batch, 1, 1, 1))
    stripes = 2 * rng.standard_normal((batch, height // 16, 1, 3)).repeat(16, axis=1)
    return (x + stripes).astype(np.float32)


def read_stage(file, variant="", stage=""):
    """A config, or one stage of it."""
    return split_stages(read(CONFIGS / f"{file}.py", variant or None))[stage]


def make_network_alone(config):
    """The network of a config, for a batch that no other device shares."""
    module: Any = make_network(config, NUM_CLASSES)
    return module.clone(axis_name=None) if hasattr(module, "axis_name") else module


class Ours(NamedTuple):
    """What is trained on our side: a config, what it makes, and values of all variables."""

    config: Any
    ours: Any
    objective: Any
    variables: dict[str, Any]
    own: dict[str, Any]


def make_ours(config, draw):
    """All in float64, of variables drawn by `draw(name, shape)`; call it with 64 bits enabled."""
    network = make_network_alone(config).clone(dtype=jnp.float64)
    objective = make_objective(config.objective.to_dict())
    init = functools.partial(network.init_with_output, train=False)
    images = jax.ShapeDtypeStruct((2, HEIGHT, WIDTH, 3), jnp.float64)
    outputs, shapes = jax.eval_shape(init, jax.random.key(0), images)
    own = jax.eval_shape(
        lambda x: objective.init(jax.random.key(0), x, NUM_CLASSES),
        outputs,
    )
    variables, own = (
        traverse_util.unflatten_dict(
            {name: draw(name, leaf.shape) for name, leaf in flat.items()}, sep="/"
        )
        for flat in (traverse_util.flatten_dict(tree, sep="/") for tree in (shapes, own))
    )
    return Ours(config, network, objective, variables, own)


def differentiate(network, objective, variables, own, images, keys=None):
    """((total, (terms, outputs, new statistics)), gradients by parameters of both)."""

    def loss(params, own):
        outputs, updated = network.apply(
            {**variables, "params": params}, images, train=True, keys=keys, mutable=["batch_stats"]
        )
        total, terms = objective(own, outputs, jnp.asarray(LABELS))
        return total, (terms, outputs, updated["batch_stats"])

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], own)


def train_ours(pair, batches):
    """Steps with the optimizer of the config, an epoch each.

    Returns:
        Variables and parameters of the objective after the last; what `differentiate` gave in the
        first.
    """
    groups = make_groups(pair.config.optimizer.to_dict())
    schedules = make_schedules(groups, steps_per_epoch=1, **pair.config.schedule)
    optimizer = make_optimizer(groups, schedules)

    @jax.jit
    def step(variables, own, opt_state, images):
        found = differentiate(pair.ours, pair.objective, variables, own, images)
        (_, (_, _, stats)), (grads, own_grads) = found
        params = {"network": variables["params"], "objective": own}
        gradients = {"network": grads, "objective": own_grads}
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        variables = {"params": params["network"], "batch_stats": stats}
        return variables, params["objective"], opt_state, found

    variables, own = pair.variables, pair.own
    opt_state = optimizer.init({"network": variables["params"], "objective": own})
    first = None
    for images in batches:
        variables, own, opt_state, found = step(variables, own, opt_state, images)
        first = found if first is None else first
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, own), sep="/")
    return variables, flat, first

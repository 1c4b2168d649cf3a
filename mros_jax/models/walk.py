"""A random walk over the images of a gallery, in closed form.

Shen et al., "Deep Group-shuffling Random Walk for Person Re-identification", CVPR 2018.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def make_transitions(same: Float[Array, "*S G G"]) -> Float[Array, "*S G G"]:
    """Probabilities of a step from one gallery image to another, W; a row sums to 1.

    Args:
        same: logits of "the same identity" of each pair of gallery images.

    Returns:
        The softmax of each row without its diagonal: no step leads from an image to itself, unless
        it is the only one. No gradient passes.
    """
    num = same.shape[-1]
    if num == 1:
        return jnp.ones_like(same)
    others = jnp.where(jnp.eye(num, dtype=bool), -jnp.inf, same)
    return lax.stop_gradient(jax.nn.softmax(others, axis=-1))


def walk(
    values: Float[Array, "*S G V"], transitions: Float[Array, "*S G G"], alpha: float
) -> Float[Array, "*S G V"]:
    """The limit of y <- a W y + (1 - a) values, which is (1 - a) (I - a W)^-1 values: one solve.

    Args:
        values: V numbers of each image.
        transitions: of `make_transitions`, W.
        alpha: a, from 0 (no walk) to below 1.
    """
    if alpha == 0:
        return values
    system = jnp.eye(transitions.shape[-1], dtype=transitions.dtype) - alpha * transitions
    with jax.default_matmul_precision("highest"):
        refined: Array = jnp.linalg.solve(system, (1 - alpha) * values)
    return refined

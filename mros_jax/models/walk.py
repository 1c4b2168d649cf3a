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
    """The limit of y <- a W y + (1 - a) values, which is (1 - a) (I - a W)^-1 values.

    Args:
        values: V numbers of each image.
        transitions: of `make_transitions`, W.
        alpha: a, from 0 (no walk) to below 1.
    """
    if alpha == 0:
        return values
    return jnp.matmul(_invert(transitions, alpha), values, precision="highest")


def _invert(transitions: Float[Array, "*S G G"], alpha: float) -> Float[Array, "*S G G"]:
    """(1 - a) (I - a W)^-1, by Gauss-Jordan elimination.

    Each row's diagonal outweighs the rest of it, so that no rows need to be exchanged. It is not
    `jnp.linalg.solve`, as LAPACK on a CPU with several devices may wait for itself forever: each of
    them holds a thread of the pool while it waits for another thread to solve a part.
    """
    num = transitions.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(num, dtype=transitions.dtype), transitions.shape)
    joined = jnp.concatenate([identity - alpha * transitions, (1 - alpha) * identity], axis=-1)

    def eliminate(k: Array, joined: Float[Array, "*S G G2"]) -> Float[Array, "*S G G2"]:
        pivot = joined[..., k, :] / joined[..., k, k, None]
        column = joined[..., k] - jax.nn.one_hot(k, num, dtype=joined.dtype)
        return joined - column[..., None] * pivot[..., None, :]

    result: Array = lax.fori_loop(0, num, eliminate, joined)
    return result[..., num:]

"""Scores of the nearest images of a query from learned heads and a random walk among the images.

Shen et al., "Deep Group-shuffling Random Walk for Person Re-identification", CVPR 2018.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mros_jax.models.walk import make_transitions, walk
from mros_jax.retrieval.neighbors import select_top

_AT_ONCE = 8  # queries; with 75 images of 2,048 numbers each takes about 4 MB


class PairHeads(NamedTuple):
    """K heads, each of which compares two images by any of K groups of their features.

    Attributes:
        kernel: (K, C, 2) weights of the squared differences of C numbers: C K is a descriptor's
            length.
        bias: (K, 2), what is added. The classes are another identity and the same.
    """

    kernel: Float[np.ndarray | Array, "K C 2"]
    bias: Float[np.ndarray | Array, "K 2"]


@functools.cache
def make_first(top: int) -> Callable[[Array], tuple[Array, Array]]:
    """What keeps a block of distances (B, G), and finds the nearest images (B, top) in it."""
    return lambda distance: (distance, select_top(-distance, top)[1])


@functools.cache
def make_rescore(alpha: float) -> Callable[..., Array]:
    """`score` of a block of queries, a few at a time: of (B, D) queries and (B, top) images."""

    def rescore(
        query: Float[Array, "B D"],
        nearest: Int[Array, "B top"],
        gallery: Float[Array, "G D"],
        kernel: Float[Array, "K C 2"],
        bias: Float[Array, "K 2"],
    ) -> Float[Array, "B top"]:
        def one(pair: tuple[Array, Array]) -> Array:
            return score(pair[0], gallery[pair[1]], PairHeads(kernel, bias), alpha)

        scores: Array = lax.map(one, (query, nearest), batch_size=_AT_ONCE)
        return scores

    return rescore


def score(
    query: Float[Array, "D"],
    images: Float[Array, "G D"],
    heads: PairHeads,
    alpha: float,
) -> Float[Array, "G"]:
    """Probability that an image is of another identity than the query, after the walk.

    Every head j scores every group i of features, and a walk among the images refines each of these
    K^2 sets of scores; the mean of the refined logits goes through a softmax of the two classes.

    Args:
        query: raw descriptor.
        images: those of the images.
        heads: of the network that made the descriptors.
        alpha: of the walk, from 0 (none) to below 1.
    """
    kernel, bias = (jnp.asarray(x) for x in heads)
    groups, size = kernel.shape[:2]
    # Differences do not change with the origin; a near one keeps rounding errors small.
    origin = jnp.mean(images, axis=0)
    x = (query - origin).reshape(groups, 1, size)
    y = jnp.moveaxis((images - origin).reshape(-1, groups, size), 1, 0)  # (K, G, C)
    einsum = functools.partial(jnp.einsum, precision="highest")
    # Softmax and the mean need the difference of the two classes alone, the walk the second one.
    lead = einsum("igc,jc->ijg", jnp.square(x - y), kernel[..., 0] - kernel[..., 1])
    lead += (bias[:, 0] - bias[:, 1])[:, None]
    weight = kernel[..., 1]
    own = einsum("igc,jc->ijg", jnp.square(y), weight)
    cross = einsum("ijgc,ihc->ijgh", y[:, None] * weight[:, None], y)
    same = own[..., None] + own[..., None, :] - 2 * cross + bias[:, 1, None, None]
    refined = walk(lead[..., None], make_transitions(same), alpha)[..., 0]  # (K, K, G)
    probability = jax.nn.sigmoid(jnp.mean(refined, axis=(0, 1)))
    # What is next to 0 is 0: compilers disagree about smaller numbers.
    return jnp.where(probability < np.finfo(np.float32).tiny, 0.0, probability)

"""Distances between descriptors: float32, products at the highest precision."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mros_jax.retrieval import blocks
from mros_jax.retrieval.inputs import Numbers, check_choice, check_pair

METRICS = ("cosine", "euclidean")


def _squared_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jnp.einsum("nd,nd->n", features, features, precision="highest")


def _inverse_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jax.lax.rsqrt(_squared_norms(features))


def _no_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jnp.zeros(len(features))


def _product(query: Float[Array, "B D"], gallery: Float[Array, "G D"]) -> Float[Array, "B G"]:
    return jnp.matmul(query, gallery.T, precision="highest")


def compute_similarity(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"], inverse_norms: Float[Array, "G"]
) -> Float[Array, "B G"]:
    """Cosine of each pair. The norms divide the product, so no normalised copy is made."""
    return _product(query, gallery) * _inverse_norms(query)[:, None] * inverse_norms


def _cosine(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"], inverse_norms: Float[Array, "G"]
) -> Float[Array, "B G"]:
    return 1.0 - compute_similarity(query, gallery, inverse_norms)


def _inner(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"], unused: Float[Array, "G"]
) -> Float[Array, "B G"]:
    return 1.0 - _product(query, gallery)


def _squared_euclidean(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"], squared_norms: Float[Array, "G"]
) -> Float[Array, "B G"]:
    distance = _squared_norms(query)[:, None] + squared_norms - 2.0 * _product(query, gallery)
    return jnp.maximum(distance, 0.0)


def _squared_chord(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"], inverse_norms: Float[Array, "G"]
) -> Float[Array, "B G"]:
    return 2.0 * _cosine(query, gallery, inverse_norms)


class Kind(NamedTuple):
    """A distance: `measure(query block, gallery, norms)`, with `norms` of the gallery made once."""

    measure: Callable[..., Array]
    norms: Callable[[Array], Array]


# Distances whose order is that of the metric. Square roots are left out: they make ties.
KINDS = {
    "cosine": Kind(_cosine, _inverse_norms),
    "inner": Kind(_inner, _no_norms),
    "chord": Kind(_squared_chord, _inverse_norms),
    "euclidean": Kind(_squared_euclidean, _squared_norms),
    "similarity": Kind(compute_similarity, _inverse_norms),
}


def place_gallery(
    gallery: Float32[np.ndarray | Array, "G D"],
    kind: str,
    devices: Sequence[jax.Device] | None = None,
) -> list[Array]:
    """The gallery and its norms on every device."""
    placed = blocks.place_everywhere(gallery, devices)
    return [placed, jax.jit(KINDS[kind].norms)(placed)]


def choose_kind(metric: str, normalize: bool) -> str:
    """The key of `KINDS` for a metric, of normalised or other descriptors."""
    if metric == "cosine":
        return "cosine" if normalize else "inner"
    return "chord" if normalize else "euclidean"


def compute_distances(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    metric: str = "cosine",
    normalize: bool = True,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Float32[np.ndarray, "Q G"]:
    """Distance of every query to every gallery image.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        metric: "cosine" (1 - inner product) or "euclidean".
        normalize: divide each row by its Euclidean norm first.
        block_size: queries in a block on one device; default 128 to 512 (see `blocks`).
        devices: default all local devices.

    Returns:
        (Q, G) float32.

    Raises:
        ValueError: NaN, infinite or (if normalised) zero rows; different widths; unknown metric.
    """
    check_choice(metric, "metric", METRICS)
    query, gallery = check_pair(query_features, gallery_features, normalize=normalize)
    kind = choose_kind(metric, normalize)
    shared = place_gallery(gallery, kind, devices)
    mapped = blocks.BlockMap(KINDS[kind].measure, shared, devices=devices)
    result = np.empty((len(query), len(gallery)), np.float32)
    for rows, block in mapped.run(
        len(query),
        len(gallery),
        lambda rows: (query[rows],),
        num_features=gallery.shape[1],
        block_size=block_size,
    ):
        result[rows] = block
    if metric == "euclidean":
        np.sqrt(np.maximum(result, 0, out=result), out=result)
    return result


def make_row_function(
    gallery: Float32[np.ndarray | Array, "G D"],
    kind: str,
    *,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[Any], Float32[np.ndarray, "B G"]]:
    """Place a checked gallery on the devices; return a function from (B, D) queries to distances.

    What it returns may be memory of a device: not to be written to.

    Args:
        gallery: (G, D).
        kind: a key of `KINDS`.
        block_size: queries in a block on one device; the block on all devices together is the
            least that is computed at once.
        devices: default all local devices.
    """
    shared = place_gallery(gallery, kind, devices)
    mapped = blocks.BlockMap(KINDS[kind].measure, shared, devices=devices)

    def compute_rows(query: Any) -> np.ndarray:
        parts = [
            block
            for _, block in mapped.run(
                len(query),
                len(gallery),
                lambda rows: (query[rows],),
                num_features=gallery.shape[1],
                block_size=block_size,
            )
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return compute_rows

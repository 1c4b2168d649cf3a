"""Distances between descriptors: float32, products at the highest precision."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mros_jax.retrieval import blocks
from mros_jax.retrieval.inputs import Numbers, check_choice, check_pair

METRICS = ("cosine", "euclidean")


def _inverse_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jax.lax.rsqrt(jnp.einsum("nd,nd->n", features, features, precision="highest"))


def similarity_block(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"]
) -> Float[Array, "B G"]:
    """Cosine of each pair. The norms divide the product, so no normalised copy is made."""
    product = jnp.matmul(query, gallery.T, precision="highest")
    return product * _inverse_norms(query)[:, None] * _inverse_norms(gallery)


def _cosine(query: Float[Array, "B D"], gallery: Float[Array, "G D"]) -> Float[Array, "B G"]:
    return 1.0 - similarity_block(query, gallery)


def _inner(query: Float[Array, "B D"], gallery: Float[Array, "G D"]) -> Float[Array, "B G"]:
    return 1.0 - jnp.matmul(query, gallery.T, precision="highest")


def _squared_euclidean(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"]
) -> Float[Array, "B G"]:
    query_norms = jnp.einsum("bd,bd->b", query, query, precision="highest")
    gallery_norms = jnp.einsum("gd,gd->g", gallery, gallery, precision="highest")
    product = jnp.matmul(query, gallery.T, precision="highest")
    return jnp.maximum(query_norms[:, None] + gallery_norms - 2.0 * product, 0.0)


def _squared_chord(query: Float[Array, "B D"], gallery: Float[Array, "G D"]) -> Float[Array, "B G"]:
    return 2.0 * _cosine(query, gallery)


# Distances whose order is that of the metric. Square roots are left out: they make ties.
KINDS = {
    "cosine": _cosine,
    "inner": _inner,
    "chord": _squared_chord,
    "euclidean": _squared_euclidean,
    "similarity": similarity_block,
}


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
        block_size: queries in a block on one device; default as many as make 64 MiB of distances.
        devices: default all local devices.

    Returns:
        (Q, G) float32.

    Raises:
        ValueError: NaN, infinite or (if normalised) zero rows; different widths; unknown metric.
    """
    check_choice(metric, "metric", METRICS)
    query, gallery = check_pair(query_features, gallery_features, normalize=normalize)
    kind = choose_kind(metric, normalize)
    result = make_row_function(gallery, kind, block_size=block_size, devices=devices)(query)
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

    Args:
        gallery: (G, D).
        kind: a key of `KINDS`.
        block_size: queries in a block on one device; the block on all devices together is the
            least that is computed at once.
        devices: default all local devices.
    """
    mapped = blocks.BlockMap(KINDS[kind], [gallery], devices=devices)

    def compute_rows(query: Any) -> np.ndarray:
        result = np.empty((len(query), len(gallery)), np.float32)
        for rows, block in mapped.run(
            len(query), len(gallery), lambda rows: (query[rows],), block_size=block_size
        ):
            result[rows] = block
        return result

    return compute_rows

"""Distances between descriptors: float32, products at the highest precision."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mros_jax.errors import UserError, check_choice
from mros_jax.retrieval import blocks
from mros_jax.retrieval.inputs import Numbers, check_pair, show_rows

METRICS = ("cosine", "euclidean")
_FEW = 128  # queries


def _squared_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jnp.einsum("nd,nd->n", features, features, precision="highest")


def _inverse_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jax.lax.rsqrt(_squared_norms(features))


def _no_norms(features: Float[Array, "N D"]) -> Float[Array, "N"]:
    return jnp.zeros(len(features))


def _product(query: Float[Array, "B D"], gallery: Float[Array, "G D"]) -> Float[Array, "B G"]:
    if len(query) > _FEW or query.shape[1] < blocks.WIDE:
        return _multiply(query, gallery)
    product: Array
    product = jax.lax.platform_dependent(query, gallery, cpu=_multiply_turned, default=_multiply)
    return product


def _multiply(query: Float[Array, "B D"], gallery: Float[Array, "G D"]) -> Float[Array, "B G"]:
    return jnp.matmul(query, gallery.T, precision="highest")


def _multiply_turned(
    query: Float[Array, "B D"], gallery: Float[Array, "G D"]
) -> Float[Array, "B G"]:
    """The same with the smaller side last: quicker for a CPU where descriptors are wide."""
    product: Array = jax.lax.optimization_barrier(_multiply(gallery, query))  # or it is turned back
    return product.T


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
    # Not 1 minus the product: that would round small products away.
    return -_product(query, gallery)


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


def choose_kind(metric: str, normalize: bool) -> str:
    """The key of `KINDS` for a metric, of normalised or other descriptors."""
    if metric == "cosine":
        return "cosine" if normalize else "inner"
    return "chord" if normalize else "euclidean"


class Gallery:
    """Descriptors on every device, to compare blocks of queries with.

    Args:
        features: (G, D), checked.
        kind: a key of `KINDS`.
        look: what to make of a block of distances (see `blocks.BlockMap`); the distances if None.
        placement: devices and block size.
    """

    def __init__(
        self,
        features: Float32[np.ndarray | Array, "G D"],
        kind: str,
        *,
        look: Callable[..., Any] | None = None,
        placement: blocks.Placement = blocks.EVERYWHERE,
    ):
        placed = blocks.place_everywhere(features, placement)
        shared = [placed, jax.jit(KINDS[kind].norms)(placed)]
        self._shape = features.shape
        self._map = blocks.BlockMap(KINDS[kind].measure, shared, look=look, placement=placement)

    def run(
        self,
        num_rows: int,
        get: Callable[[slice], Sequence[Any]],
        finish: Callable[[slice, Any], Any] | None = None,
    ) -> Iterator[tuple[slice, Any]]:
        """Results block by block; `get` returns the queries of a slice, and what `look` needs.

        `finish`: see `blocks.BlockMap.run`.
        """
        return self._map.run(num_rows, self._shape[0], get, finish, num_features=self._shape[1])

    def __call__(self, query: Any, *others: Any) -> Any:
        """Results of (Q, D) queries; `others` are what `look` needs, of as many rows.

        They may be memory of a device: not to be written to.
        """
        return self._map.collect(
            len(query),
            self._shape[0],
            lambda rows: [array[rows] for array in (query, *others)],
            num_features=self._shape[1],
        )


def restore(
    block: Float32[np.ndarray, "B G"], metric: str, exponent: int
) -> Float[np.ndarray, "B G"]:
    """Distances as the metric defines them, from those of a kind that only keeps their order.

    Args:
        block: of the "euclidean" kinds, squared; not written to.
        metric: "cosine" or "euclidean".
        exponent: of `inputs.Pair`. Where it is not 0 the result is float64, in which the distances
            of the descriptors as they were given have room.

    Raises:
        UserError: not even float64 holds them.
    """
    if metric == "euclidean":
        block = np.sqrt(np.maximum(block, 0))
    if exponent == 0:
        return block
    with np.errstate(over="ignore", under="ignore"):
        result = np.ldexp(
            block.astype(np.float64), (-1 if metric == "euclidean" else -2) * exponent
        )
    size = np.abs(result)
    bad = ~np.isfinite(size) | ((size < np.finfo(np.float64).tiny) & (block != 0))
    if bad.any():
        raise UserError(
            f"float64 cannot hold the {metric} distances of {show_rows(bad.any(1))}: scale the "
            "descriptors, or normalise them"
        )
    return result


def prepare_distances(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    metric: str = "cosine",
    normalize: bool = True,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Callable[[Any], Float[np.ndarray, "B G"]]:
    """Do what is done once for all queries; the result gives the distances of some.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        metric: as for `compute_distances`.
        normalize: as for `compute_distances`.
        placement: devices and block size.

    Returns:
        A function of query indices, or a slice of them, to what `compute_distances` has for these.

    Raises:
        UserError: as `compute_distances`.
    """
    check_choice("metric", metric, METRICS)
    query, gallery, exponent = check_pair(query_features, gallery_features, normalize=normalize)
    compute = Gallery(gallery, choose_kind(metric, normalize), placement=placement)

    def compute_rows(rows: Any) -> Float[np.ndarray, "B G"]:
        result = restore(compute(query[rows]), metric, exponent)
        return result if result.flags.writeable else result.copy()

    return compute_rows


def compute_distances(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    metric: str = "cosine",
    normalize: bool = True,
    placement: blocks.Placement = blocks.EVERYWHERE,
) -> Float[np.ndarray, "Q G"]:
    """Distance of every query to every gallery image.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        metric: "cosine" (1 - cosine; if not normalised minus the inner product) or "euclidean".
        normalize: divide each row by its Euclidean norm first.
        placement: devices and block size.

    Returns:
        (Q, G) float32; float64 where float32 could not hold unnormalised descriptors.

    Raises:
        UserError: NaN, infinite or (if normalised) zero rows; different widths; unknown metric.
    """
    compute_rows = prepare_distances(
        query_features, gallery_features, metric=metric, normalize=normalize, placement=placement
    )
    return compute_rows(slice(None))

"""Re-ranking by neighbourhoods: ECN, k-reciprocal encoding, average query expansion.

Each needs only the lists of nearest neighbours and sparse vectors over them; nothing of size
(queries + gallery) squared is ever made. Descriptors are always normalised.

Every method comes in two forms: a function that returns the (Q, G) distances, and a `prepare_*`
function that returns a `Rows`: called with query indices and an array, it writes the distances of
those queries into the array. With it `evaluate` ranks block by block and never holds all of them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mros_jax.retrieval import blocks, distances
from mros_jax.retrieval.inputs import Numbers, check_choice, check_count, check_pair
from mros_jax.retrieval.neighbors import (
    Neighbors,
    check_neighbors,
    find_farthest,
    search_faiss,
    search_gallery,
    search_neighbors,
    stack,
)
from mros_jax.retrieval.reciprocal import compute_jaccard, encode, make_rows, scale_distances

Rows = Callable[[np.ndarray, np.ndarray], None]


def prepare_ecn(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    k: int = 25,
    t: int = 3,
    q: int = 8,
    method: str = "rankdist",
    neighbors: Numbers | str = "exact",
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Rows:
    """As `ecn`, but returns a `Rows`."""
    check_choice(method, "method", ("rankdist", "origdist"))
    query, gallery = check_pair(query_features, gallery_features, normalize=True)
    num_query, num = len(query), len(query) + len(gallery)
    for name, value, extra in (("k", k, 0), ("t", t, 1), ("q", q, 1)):
        check_count(value, name, most=num - extra, of="images in queries and gallery together")
    length = max(k, t + 1, q + 1)
    spread: dict[str, Any] = {"block_size": block_size, "devices": devices}
    features = stack(query, gallery)
    query, gallery = features[:num_query], features[num_query:]
    lists = _find_neighbors(features, length, neighbors, **spread).indices
    first = lists[:, 1 : t + 1]
    expanded = np.concatenate([first, lists[first, 1 : q + 1].reshape(num, t * q)], axis=1)
    chosen = make_rows(expanded, np.ones(expanded.shape, np.float32), num)
    count = expanded.shape[1]

    if method == "origdist":
        # The mean of 1 - x_n . x_g over n is 1 - (mean of x_n) . x_g.
        cosines = distances.make_row_function(features, "similarity", **spread)
        host = np.asarray(features)
        scale = 1 / np.sqrt(np.einsum("nd,nd->n", host, host))

        def write_means(rows: np.ndarray, out: np.ndarray) -> None:
            own = chosen[rows].multiply(scale).tocsr() @ host  # (B, D)
            from_query = own @ host[num_query:].T * scale[num_query:]
            from_gallery = (chosen[num_query:] @ cosines(query[rows]).T).T
            np.subtract(1.0, (from_query + from_gallery) / (2 * count), out=out)

        return write_means

    # Whole numbers, so float32 sums are exact below 2**24; the division comes last, in float64.
    weights = np.broadcast_to(np.arange(k, 0, -1, dtype=np.float32), (num, k))
    rank = make_rows(lists[:, :k], weights, num)
    mean = chosen @ rank
    rank_t, mean_t = rank[num_query:].T.tocsr(), mean[num_query:].T.tocsr()
    cosine_distances = distances.make_row_function(gallery, "cosine", **spread)

    def write_ranks(rows: np.ndarray, out: np.ndarray) -> None:
        total = mean[rows] @ rank_t + rank[rows] @ mean_t
        np.copyto(out, cosine_distances(query[rows]))
        row = np.repeat(np.arange(len(rows)), np.diff(total.indptr))
        out[row, total.indices] = total.data.astype(np.float64) / (-2 * count)

    return write_ranks


def ecn(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    k: int = 25,
    t: int = 3,
    q: int = 8,
    method: str = "rankdist",
    neighbors: Numbers | str = "exact",
    dtype: Any = np.float64,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Float[np.ndarray, "Q G"]:
    """Expanded cross neighbourhood distances (Sarfraz et al., CVPR 2018).

    The rank vector w_i gives each image b max(0, k - position of b in i's list); the rank distance
    is r(i, j) = -w_i . w_j; the expanded neighbours N(i) are the t nearest of i and the q nearest
    of each of those. The distance of query and gallery image is the mean of r(n, gallery) over
    N(query) and r(query, n) over N(gallery). As r is bilinear the mean over n is taken first: with
    E_i the mean of w_n over N(i), it is -(E_q . w_g + w_q . E_g) / 2, two sparse products. Where
    that is 0 the cosine distance stands in its place (so those come last, in cosine order).

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        k: length of the rank lists, the image itself counted.
        t: nearest neighbours taken first.
        q: neighbours taken of each of those.
        method: "rankdist", or "origdist": the same mean of cosine distances.
        neighbors: "exact"; "faiss", or "faiss:" and its description of an index, as in
            "faiss:IVF1024,Flat" (the extra `faiss`); or lists from any other search: (Q + G, at
            least max(k, q + 1, t + 1)) indices into queries and gallery stacked, nearest first.
        dtype: of the result. float64 is exact; float32 needs half the memory and keeps the order.
        block_size: rows in a block on one device.
        devices: default all local devices.

    Returns:
        (Q, G) distances.

    Raises:
        ValueError: bad features (see `evaluate`), parameters below 1, lists longer than Q + G.
    """
    write = prepare_ecn(
        query_features,
        gallery_features,
        k=k,
        t=t,
        q=q,
        method=method,
        neighbors=neighbors,
        block_size=block_size,
        devices=devices,
    )
    return _fill(write, query_features, gallery_features, dtype)


def prepare_k_reciprocal(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float | int = 0.3,
    neighbors: Numbers | str = "exact",
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Rows:
    """As `k_reciprocal`, but returns a `Rows`."""
    query, gallery = check_pair(query_features, gallery_features, normalize=True)
    num_query, num = len(query), len(query) + len(gallery)
    check_count(k1, "k1", most=num - 1, of="other images in queries and gallery together")
    check_count(k2, "k2", most=num, of="images in queries and gallery together")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value is {lambda_value}; expected a share between 0 and 1")
    features = stack(query, gallery)
    query, gallery = features[:num_query], features[num_query:]
    length = max(k1 + 1, k2)
    spread: dict[str, Any] = {"block_size": block_size, "devices": devices}
    found = _find_neighbors(features, length, neighbors, **spread)
    smallest = found.smallest
    if smallest is None:
        smallest = find_farthest(features, **spread)
    encoded = encode(features, found._replace(smallest=smallest), k1, k2)
    encoded_gallery = encoded[num_query:].tocsc()
    cosine_distances = distances.make_row_function(gallery, "cosine", **spread)

    def write(rows: np.ndarray, out: np.ndarray) -> None:
        np.multiply(compute_jaccard(encoded[rows], encoded_gallery), 1 - lambda_value, out=out)
        original = scale_distances(cosine_distances(query[rows]), smallest[rows, None])
        original *= lambda_value
        out += original

    return write


def k_reciprocal(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float | int = 0.3,
    neighbors: Numbers | str = "exact",
    dtype: Any = np.float32,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Float[np.ndarray, "Q G"]:
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017), as the paper's own code computes it.

    Squared Euclidean distances of unit vectors, divided by the largest of the row; k1 + 1
    neighbours with the image itself; weights exp(-d) over the expanded reciprocal sets; mean over
    k2 neighbours; (1 - lambda) * Jaccard distance + lambda * original distance.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        k1: neighbours for the reciprocal sets.
        k2: neighbours, itself counted, for the local query expansion; 1 leaves it out.
        lambda_value: weight of the original distance.
        neighbors: as for `ecn`; lists of at least max(k1 + 1, k2).
        dtype: of the result.
        block_size: rows in a block on one device.
        devices: default all local devices.

    Returns:
        (Q, G) distances between 0 and 1.

    Raises:
        ValueError: bad features (see `evaluate`), parameters out of range.
    """
    write = prepare_k_reciprocal(
        query_features,
        gallery_features,
        k1=k1,
        k2=k2,
        lambda_value=lambda_value,
        neighbors=neighbors,
        block_size=block_size,
        devices=devices,
    )
    return _fill(write, query_features, gallery_features, dtype)


def prepare_aqe(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    k: int = 5,
    alpha: float | int = 0.0,
    neighbors: Numbers | str = "exact",
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Rows:
    """As `aqe`, but returns a `Rows`."""
    query, gallery = check_pair(query_features, gallery_features, normalize=True)
    check_count(k, "k", most=len(gallery), of="gallery images")
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; expected 0 (plain mean) or more")
    if isinstance(neighbors, str):
        check_choice(neighbors, "neighbors", ("exact",))
        lists = search_gallery(query, gallery, k, block_size=block_size, devices=devices)
    else:
        lists = np.asarray(neighbors)
        if lists.shape[:1] != (len(query),) or lists.ndim != 2 or lists.shape[1] < k:
            raise ValueError(f"neighbors has shape {lists.shape}; expected ({len(query)}, >= {k})")
        if lists.dtype.kind not in "iu" or lists.min() < 0 or lists.max() >= len(gallery):
            raise ValueError(f"neighbors must hold gallery indices 0..{len(gallery) - 1}")
        lists = lists[:, :k]
    cosine_distances = distances.make_row_function(
        gallery, "cosine", block_size=block_size, devices=devices
    )

    def write(rows: np.ndarray, out: np.ndarray) -> None:
        expanded = _expand_queries(query[rows], gallery[lists[rows]], float(alpha))
        np.copyto(out, cosine_distances(np.asarray(expanded)))

    return write


@jax.jit
def _expand_queries(
    query: Float[Array, "B D"], near: Float[Array, "B k D"], alpha: float | Float[Array, ""]
) -> Float[Array, "B D"]:
    query = query / jnp.linalg.norm(query, axis=1, keepdims=True)
    near = near / jnp.linalg.norm(near, axis=2, keepdims=True)
    cosine = jnp.einsum("bd,bkd->bk", query, near, precision="highest")
    weight = jnp.maximum(cosine, 0.0) ** alpha
    return query + jnp.einsum("bk,bkd->bd", weight, near, precision="highest")


def aqe(
    query_features: Numbers,
    gallery_features: Numbers,
    *,
    k: int = 5,
    alpha: float | int = 0.0,
    neighbors: Numbers | str = "exact",
    dtype: Any = np.float32,
    block_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Float[np.ndarray, "Q G"]:
    """Average query expansion (Chum et al., ICCV 2007; alpha: Radenovic et al., TPAMI 2019).

    Each query becomes the mean of itself and its k nearest gallery images, all of unit length, each
    weighted by its cosine to the power of alpha; then plain cosine distances.

    Args:
        query_features: (Q, D).
        gallery_features: (G, D).
        k: gallery images to add.
        alpha: 0 weights them all the same.
        neighbors: "exact", or (Q, at least k) gallery indices from another search.
        dtype: of the result.
        block_size: rows in a block on one device.
        devices: default all local devices.

    Returns:
        (Q, G) cosine distances.

    Raises:
        ValueError: bad features (see `evaluate`), k larger than the gallery.
    """
    write = prepare_aqe(
        query_features,
        gallery_features,
        k=k,
        alpha=alpha,
        neighbors=neighbors,
        block_size=block_size,
        devices=devices,
    )
    return _fill(write, query_features, gallery_features, dtype)


def _find_neighbors(
    features: Any, length: int, neighbors: Numbers | str, **spread: Any
) -> Neighbors:
    """Lists from the search that was asked for, or those given."""
    if isinstance(neighbors, str):
        if neighbors == "exact":
            return search_neighbors(features, length, **spread)
        name, _, factory = neighbors.partition(":")
        check_choice(name, "neighbors", ("exact", "faiss", "faiss:FACTORY"))
        neighbors = search_faiss(features, length, factory=factory or "Flat")
    lists = check_neighbors(neighbors, len(features), length)[:, :length]
    return Neighbors(lists, None, None)


def _fill(write: Rows, query: Any, gallery: Any, dtype: Any) -> np.ndarray:
    """The whole matrix, a block of queries at a time."""
    num_query, num_gallery = len(query), len(gallery)
    result = np.empty((num_query, num_gallery), dtype)
    step = blocks.choose_block(num_gallery, np.shape(gallery)[1])
    for start in range(0, num_query, step):
        rows = np.arange(start, min(start + step, num_query))
        write(rows, result[start : start + step])
    return result


METHODS: dict[str, Callable[..., Rows]] = {
    "ecn": prepare_ecn,
    "k_reciprocal": prepare_k_reciprocal,
    "aqe": prepare_aqe,
}


def describe(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a re-ranking, defaults included, as the protocol states them."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    values = defaults | dict(options)
    del values["block_size"], values["devices"]
    if not isinstance(values["neighbors"], str):
        values["neighbors"] = "given"
    return values

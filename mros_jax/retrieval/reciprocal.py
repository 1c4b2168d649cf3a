"""k-reciprocal sets and their sparse encoding (Zhong et al., CVPR 2017)."""

from typing import Any

import numpy as np
import scipy  # whose modules are imported when they are used
from jaxtyping import Bool, Float64, Int, Int32

from mros_jax.retrieval.neighbors import Neighbors, compute_cosines


def make_rows(columns: np.ndarray, data: np.ndarray, num: int) -> "scipy.sparse.csr_array":
    """Sparse rows from equally long lists of columns; columns met twice add up in products."""
    starts = np.arange(0, columns.size + 1, columns.shape[1], dtype=np.int32)
    return scipy.sparse.csr_array(
        (np.ascontiguousarray(data).ravel(), np.ascontiguousarray(columns).ravel(), starts),
        shape=(len(columns), num),
    )


def find_reciprocal(lists: Int32[np.ndarray, "N k"], block: int = 4096) -> Bool[np.ndarray, "N k"]:
    """Whether each image in i's list has i in its own list."""
    result = np.empty(lists.shape, bool)
    for start in range(0, len(lists), block):
        rows = lists[start : start + block]
        index = np.arange(start, start + len(rows), dtype=lists.dtype)
        result[start : start + block] = (lists[rows] == index[:, None, None]).any(2)
    return result


def _reciprocal_rows(lists: Int32[np.ndarray, "N k"]) -> "scipy.sparse.csr_array":
    """Reciprocal neighbours as a 0/1 matrix."""
    mask = find_reciprocal(lists)
    starts = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    columns = lists[mask]
    shape = (len(lists), len(lists))
    rows = scipy.sparse.csr_array((np.ones(len(columns), np.int32), columns, starts), shape=shape)
    rows.sort_indices()
    return rows


def expand_sets(lists: Int32[np.ndarray, "N k"], k1: int) -> "scipy.sparse.csr_array":
    """Expanded k-reciprocal sets as a 0/1 matrix (Eq. 4 of the paper).

    A candidate's half-sized reciprocal set joins where more than two thirds of it are members.
    """
    num = len(lists)
    half_lists = lists[:, : int(np.around(k1 / 2)) + 1]
    full_lists = lists[:, : k1 + 1]
    half, full = _reciprocal_rows(half_lists), _reciprocal_rows(full_lists)
    overlap = full.multiply(full @ half.T.tocsr()).tocoo()  # (i, candidate): members in common
    sizes = np.diff(half.indptr)
    accepted = 3 * overlap.data > 2 * sizes[overlap.col]
    chosen = scipy.sparse.csr_array(
        (np.ones(accepted.sum(), np.int32), (overlap.row[accepted], overlap.col[accepted])),
        shape=(num, num),
    )
    expanded = (full + chosen @ half).tocsr()
    expanded.data[:] = 1
    return expanded


def _pair_cosines(
    features: Any, neighbors: Neighbors, row: Int[np.ndarray, "P"], column: Int[np.ndarray, "P"]
) -> Float64[np.ndarray, "P"]:
    """Cosine of each (row, column): from the lists where it is there, else computed."""
    num = len(neighbors.indices)
    keys = np.arange(num, dtype=np.int64)[:, None] * num + neighbors.indices
    order = np.argsort(keys, axis=None)
    keys, known = keys.ravel()[order], neighbors.similarity.ravel()[order]
    wanted = row.astype(np.int64) * num + column
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    result: np.ndarray = known[place].astype(np.float64)
    missing = np.flatnonzero(keys[place] != wanted)
    result[missing] = compute_cosines(features, row[missing], column[missing])
    return result


def encode(features: Any, neighbors: Neighbors, k1: int, k2: int) -> "scipy.sparse.csr_array":
    """Row-normalised Gaussian weights over the expanded sets, averaged over k2 neighbours.

    Distances are squared Euclidean ones of unit vectors, divided by the largest of the row, as in
    the authors' code.
    """
    sets = expand_sets(neighbors.indices, k1)
    row = np.repeat(np.arange(sets.shape[0]), np.diff(sets.indptr))
    cosine = _pair_cosines(features, neighbors, row, sets.indices)
    weights = np.exp(-scale_distances(1.0 - cosine, neighbors.smallest[row]))
    weights /= np.bincount(row, weights)[row]
    encoded = scipy.sparse.csr_array(
        (weights.astype(np.float32), sets.indices, sets.indptr), shape=sets.shape
    )
    if k2 > 1:
        near = neighbors.indices[:, :k2]
        mean = make_rows(near, np.full(near.shape, 1 / k2, np.float32), len(near))
        encoded = (mean @ encoded).tocsr()
    return encoded


def scale_distances(cosine_distance: np.ndarray, smallest: np.ndarray) -> np.ndarray:
    """Divide by the distance of the farthest image; 0 where all images are alike."""
    farthest = np.maximum(1.0 - smallest, np.finfo(np.float32).tiny)
    scaled: np.ndarray = np.maximum(cosine_distance, 0)
    scaled /= farthest
    return scaled


def compute_jaccard(
    query: "scipy.sparse.csr_array", gallery: "scipy.sparse.csc_array"
) -> Float64[np.ndarray, "B G"]:
    """1 - sum of minima / sum of maxima of each pair of rows that each sum to 1."""
    num, num_gallery = query.shape[0], gallery.shape[0]
    starts = gallery.indptr[query.indices]
    lengths = gallery.indptr[query.indices + 1] - starts
    place = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    place += np.arange(len(place))
    cell = np.repeat(np.repeat(np.arange(num) * num_gallery, np.diff(query.indptr)), lengths)
    cell += gallery.indices[place]
    minima = np.minimum(np.repeat(query.data, lengths), gallery.data[place])
    shared = np.bincount(cell, minima, minlength=num * num_gallery)
    shared = shared.reshape(num, num_gallery)
    distance = np.subtract(2.0, shared)
    np.divide(shared, distance, out=distance)
    return np.subtract(1.0, distance, out=distance)

"""Checks of what users hand in: each error names the value seen and the way out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int64

Numbers = np.ndarray | jax.Array | Sequence[Any]


def _rows(mask: np.ndarray) -> str:
    """First row numbers where `mask` holds, for a message."""
    rows = np.flatnonzero(mask)
    return f"{', '.join(map(str, rows[:10]))}{', ...' if len(rows) > 10 else ''}"


def check_features(
    features: Numbers, name: str, *, normalize: bool
) -> Float32[np.ndarray | jax.Array, "N D"]:
    """Return features as a finite (N, D) float32 array, without a copy where they are one already.

    Args:
        features: (N, D) numbers.
        name: what to call them in a message.
        normalize: whether they will be divided by their norm, so that none may be zero.

    Raises:
        ValueError: not a matrix of numbers, empty, NaN or infinite, or zero rows to normalise.
    """
    array = features if isinstance(features, jax.Array) else np.asarray(features)
    if array.ndim != 2 or array.dtype.kind not in "fiubV":
        raise ValueError(
            f"{name} has shape {array.shape} and type {array.dtype}; expected numbers of shape "
            "(images, features)"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    if array.dtype != np.float32:
        array = array.astype(np.float32)
    norms = squared_norms(array)
    bad = ~np.isfinite(norms)
    if bad.any():
        raise ValueError(
            f"{name} holds NaN, infinity or numbers whose squares overflow float32 in "
            f"{bad.sum()} of {len(bad)} rows: {_rows(bad)}"
        )
    if normalize and (norms == 0).any():
        raise ValueError(
            f"{name} is zero in {(norms == 0).sum()} of {len(norms)} rows: {_rows(norms == 0)}. "
            "A zero vector has no direction: remove those images or pass normalize=False"
        )
    return array


def squared_norms(features: Float32[np.ndarray | jax.Array, "N D"]) -> Float32[np.ndarray, "N"]:
    """Squared Euclidean norm of each row."""
    if isinstance(features, jax.Array):
        return np.asarray(jax.numpy.einsum("nd,nd->n", features, features, precision="highest"))
    return np.einsum("nd,nd->n", features, features)


def check_pair(
    query_features: Numbers, gallery_features: Numbers, *, normalize: bool
) -> tuple[Float32[np.ndarray | jax.Array, "Q D"], Float32[np.ndarray | jax.Array, "G D"]]:
    """Check both feature matrices and that they have the same number of columns.

    Raises:
        ValueError: as `check_features`, or different widths.
    """
    query = check_features(query_features, "query_features", normalize=normalize)
    gallery = check_features(gallery_features, "gallery_features", normalize=normalize)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query_features has {query.shape[1]} columns, gallery_features {gallery.shape[1]}: "
            "both must come from the same model"
        )
    return query, gallery


def check_ids(ids: Numbers, name: str, length: int) -> Int64[np.ndarray, "N"]:
    """Return whole-number labels as int64.

    Raises:
        ValueError: strings, fractions, not one-dimensional, or not `length` of them.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or len(array) != length:
        raise ValueError(
            f"{name} has shape {array.shape}; expected ({length},), one for each image"
        )
    whole = array.dtype.kind in "iu" or (
        array.dtype.kind == "f" and np.array_equal(array, np.round(array))
    )
    if not whole:
        raise ValueError(
            f"{name} holds {array.dtype} (first: {array[0]!r}); expected whole numbers. Number "
            "them over query and gallery together, e.g. with np.unique(both, return_inverse=True)"
        )
    return array.astype(np.int64)


def check_choice(value: str | None, name: str, choices: Sequence[str | None]) -> None:
    """Raise a ValueError unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_count(value: int, name: str, *, most: int | None = None, of: str = "") -> None:
    """Raise a ValueError unless 1 <= value <= most (`of` says what `most` counts)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    if most is not None and value > most:
        raise ValueError(
            f"{name} is {value}, but there are only {most} {of}: choose {name} <= {most}"
        )

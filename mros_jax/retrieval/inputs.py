"""Checks of what users hand in: each error names the value seen and the way out."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int64

from mros_jax.errors import UserError

Numbers = np.ndarray | jax.Array | Sequence[Any]
# Squared norms between these keep squares and products of float32 away from its ends, where numbers
# become infinite, or are flushed to zero.
_LEAST, _MOST = 2.0**-100, 2.0**100
_SPAN = 100  # powers of two between the largest and the smallest row that one scale can hold
_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")


class Pair(NamedTuple):
    """Checked features of queries and gallery, in the range of float32.

    Attributes:
        query: (Q, D) float32.
        gallery: (G, D) float32.
        exponent: both are what was given times 2**exponent. Where rows will be normalised each may
            also have a power of two of its own, and this is 0.
    """

    query: Float32[np.ndarray | jax.Array, "Q D"]
    gallery: Float32[np.ndarray | jax.Array, "G D"]
    exponent: int


def show_rows(mask: Bool[np.ndarray, "N"]) -> str:
    """How many rows `mask` marks, and the first ones, for a message."""
    rows = np.flatnonzero(mask)
    return (
        f"{len(rows)} of {len(mask)} rows: {', '.join(map(str, rows[:10]))}"
        f"{', ...' if len(rows) > 10 else ''}"
    )


def _check_features(features: Numbers, name: str) -> np.ndarray | jax.Array:
    array = features if isinstance(features, jax.Array) else np.asarray(features)
    numbers = array.dtype.kind in "fiub" or jnp.issubdtype(array.dtype, jnp.floating)
    if array.ndim != 2 or not numbers:
        raise UserError(
            f"{name} has shape {array.shape} and type {array.dtype}; expected numbers of shape "
            "(images, features)"
        )
    if 0 in array.shape:
        raise UserError(f"{name} is empty: its shape is {array.shape}")
    return array


def _as_float32(
    given: np.ndarray | jax.Array, zeros: bool
) -> Float32[np.ndarray | jax.Array, "N D"] | None:
    """The array as float32 where its rows keep clear of the ends of that range, else None.

    With `zeros`, rows of zeros do so too.
    """
    array = given
    if given.dtype != np.float32:
        with np.errstate(over="ignore", under="ignore"):
            array = given.astype(np.float32)
    norms = squared_norms(array)
    inside = (norms >= _LEAST) & (norms <= _MOST)
    empty = np.flatnonzero(norms == 0)
    if zeros and len(empty) and not np.asarray(given[empty]).any():
        inside[empty] = True
    return array if inside.all() else None


def _find_exponents(array: np.ndarray | jax.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The array as NumPy floats, and for each row the e with largest magnitude in [2^(e-1), 2^e).

    NumPy sees subnormal numbers, which compilers may take for zero. Rows of zeros get -10000.
    """
    # Half precision has less range than single; whole numbers may have 64 bits.
    kind = np.dtype(array.dtype)
    wide = np.asarray(array)
    if kind.kind in "iub":
        wide = wide.astype(np.float64)
    elif kind.kind != "f" or kind.itemsize < 4:
        wide = wide.astype(np.float32)
    peaks = np.maximum(wide.max(1), -wide.min(1))
    bad = ~np.isfinite(peaks)
    if bad.any():
        raise UserError(f"{name} holds NaN or infinity in {show_rows(bad)}")
    return wide, np.where(peaks > 0, np.frexp(peaks)[1], -10000)


def _scale(wide: np.ndarray, shift: Any) -> Float32[np.ndarray, "N D"]:
    """Multiply by 2**shift, exactly but for numbers that vanish beside their row's largest."""
    with np.errstate(under="ignore"):
        scaled: np.ndarray = np.ldexp(wide, shift).astype(np.float32)
    return scaled


def check_pair(query_features: Numbers, gallery_features: Numbers, *, normalize: bool) -> Pair:
    """Check the features of queries and gallery, and bring them into the range of float32.

    Features that are there already are returned as they are, without a copy where they are float32.
    Others are multiplied by powers of two, which changes no digit: each row by its own where rows
    are normalised, all by the same where they are not.

    Args:
        query_features: (Q, D) numbers of any type.
        gallery_features: (G, D).
        normalize: whether rows will be divided by their norm, so that none may be zero.

    Raises:
        UserError: no matrices of numbers, empty, or of different widths; rows with NaN or infinity;
            zero rows to normalise; unnormalised rows too far apart for float32.
    """
    given = {"query_features": query_features, "gallery_features": gallery_features}
    arrays = {name: _check_features(features, name) for name, features in given.items()}
    widths = [array.shape[1] for array in arrays.values()]
    if widths[0] != widths[1]:
        raise UserError(
            f"query_features has {widths[0]} columns, gallery_features {widths[1]}: "
            "both must come from the same model"
        )
    ready = [_as_float32(array, zeros=not normalize) for array in arrays.values()]
    if ready[0] is not None and ready[1] is not None:
        return Pair(ready[0], ready[1], 0)
    found = [_find_exponents(array, name) for name, array in arrays.items()]
    if normalize:
        for name, (_, exponents) in zip(given, found, strict=True):
            zero = exponents == -10000
            if zero.any():
                raise UserError(
                    f"{name} is zero in {show_rows(zero)}. A zero vector has no direction: remove "
                    "those images or pass normalize=False"
                )
        query, gallery = (
            array if array is not None else _scale(wide, -exponents[:, None])
            for array, (wide, exponents) in zip(ready, found, strict=True)
        )
        return Pair(query, gallery, 0)
    exponents = np.concatenate([e for _, e in found])
    if (exponents == -10000).all():
        exponents = np.zeros(1, int)
    high, low = int(exponents.max()), int(exponents[exponents > -10000].min())
    if high - low > _SPAN:
        name = max(given, key=lambda n: found[list(given).index(n)][1].max())
        row = int(np.argmax(found[list(given).index(name)][1]))
        raise UserError(
            f"the largest descriptor ({name}, row {row}, about 2**{high}) and the smallest (about "
            f"2**{low}) are further apart than float32 can hold at once: leave such images out or "
            "normalise descriptors"
        )
    shift = -(high + low) // 2
    query, gallery = (_scale(wide, shift) for wide, _ in found)
    return Pair(query, gallery, shift)


def check_matrix(distance: Numbers) -> np.ndarray | jax.Array:
    """Return given distances as a float32 or float64 matrix that has every one of them exactly.

    Raises:
        UserError: no matrix of numbers, empty, or whole numbers that float64 would round.
    """
    matrix = distance if isinstance(distance, jax.Array) else np.asarray(distance)
    kind: str = matrix.dtype.kind
    if (
        matrix.ndim != 2
        or 0 in matrix.shape
        or not (kind in "fiub" or jnp.issubdtype(matrix.dtype, jnp.floating))
    ):
        raise UserError(
            f"distance has shape {matrix.shape} and type {matrix.dtype}; expected numbers of shape "
            "(queries, gallery)"
        )
    if matrix.dtype in (np.float32, np.float64):
        return matrix
    if kind in "iub":
        whole = np.asarray(matrix)
        if max(int(whole.max()), -int(whole.min())) > 2**53:
            raise UserError("distance holds whole numbers beyond 2**53, which would be rounded")
        return whole.astype(np.float64)
    return matrix.astype(np.float64 if matrix.dtype.itemsize > 4 else np.float32)


def squared_norms(features: Float32[np.ndarray | jax.Array, "N D"]) -> Float32[np.ndarray, "N"]:
    """Squared Euclidean norm of each row."""
    if isinstance(features, jax.Array):
        return np.asarray(jnp.einsum("nd,nd->n", features, features, precision="highest"))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norms: np.ndarray = np.einsum("nd,nd->n", features, features)
    return norms


def check_ids(ids: Numbers, name: str, length: int) -> Int64[np.ndarray, "N"]:
    """Return labels as int64, exactly.

    Whole numbers of any type are taken: integers, floats small enough to be exact, booleans, and
    text of digits.

    Raises:
        UserError: not one-dimensional, not `length` of them; the first label that is no whole
            number, or does not fit 64 bits, by its index.
    """
    # A list is looked at one by one: NumPy would round large numbers where types are mixed.
    array = ids if isinstance(ids, np.ndarray | jax.Array) else np.array(ids, dtype=object)
    if array.ndim != 1 or len(array) != length:
        raise UserError(f"{name} has shape {array.shape}; expected ({length},), one for each image")
    kind = array.dtype.kind
    array = np.asarray(array)
    if kind in "ib":
        return array.astype(np.int64)
    if kind == "u":
        bad = array > np.uint64(2**63 - 1)
    elif jnp.issubdtype(array.dtype, jnp.floating):
        # From here on neighbouring whole numbers are the same float.
        most = 2.0 ** (min(jnp.finfo(array.dtype).nmant, 52) + 1)
        array = array.astype(np.longdouble if array.dtype.itemsize > 8 else np.float64)
        with np.errstate(invalid="ignore"):
            bad = ~((np.abs(array) < most) & (array == np.round(array)))
    else:
        values = [_read_whole(value) for value in array.tolist()]
        bad = np.array([value is None for value in values], bool)
        array = np.array([value or 0 for value in values], np.int64)
    if bad.any():
        index = int(np.argmax(bad))
        raise UserError(
            f"{name}[{index}] is {np.asarray(ids, object)[index]!r}; expected whole numbers that "
            "fit 64 bits (floats only as far as they are exact). Number labels over query and "
            "gallery together, e.g. with np.unique(both, return_inverse=True)"
        )
    return array.astype(np.int64)


def _read_whole(value: Any) -> int | None:
    """A whole number of 64 bits from one Python or NumPy value; None if it is none."""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, str):
        value = int(value) if len(value) < 99 and _WHOLE.fullmatch(value) else None
    elif isinstance(value, float | np.floating):
        value = int(value) if float(value).is_integer() and abs(float(value)) < 2**53 else None
    elif isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
        value = _read_whole(value.item())
    if not isinstance(value, int | np.integer | np.bool_) or not -(2**63) <= int(value) < 2**63:
        return None
    return int(value)


def check_pid(pid: int | None, name: str) -> None:
    """Raise a UserError unless `pid` is a whole number or None."""
    if pid is not None and (isinstance(pid, bool) or not isinstance(pid, int | np.integer)):
        raise UserError(f"{name} is {pid!r}; expected a whole number, or None if there is none")


def check_count(value: Any, name: str, *, most: int | None = None, of: str = "") -> None:
    """Raise a UserError unless 1 <= value <= most (`of` says what `most` counts)."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} is {value!r}; expected a whole number of at least 1")
    if most is not None and value > most:
        raise UserError(
            f"{name} is {value}, but there are only {most} {of}: choose {name} <= {most}"
        )


def check_number(
    value: Any, name: str, least: float, most: float = np.inf, *, ends: bool = True
) -> None:
    """Raise a UserError unless least <= value <= most (without the ends: <)."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    inside = number and (least <= value <= most if ends else least < value < most)
    if not inside or not np.isfinite(value):
        limit = f"of at least {least:g}" if most == np.inf else f"between {least:g} and {most:g}"
        raise UserError(f"{name} is {value!r}; expected a number {limit}")

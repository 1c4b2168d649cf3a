"""A map of descriptors: the plane in which they differ most."""

import numpy as np
import scipy.sparse.linalg
from jaxtyping import Float, Shaped

from mros_jax.errors import UserError


def project(
    features: Shaped[np.ndarray, "N D"], normalize: bool = True
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "2"]]:
    """The two principal components of descriptors (Pearson 1901).

    Args:
        features: descriptors.
        normalize: divide each by its Euclidean norm first.

    Returns:
        Where each lies along both, and the share of the variance along each. The direction that
        has more on its longer side is the positive one, so that the map is the same every time.

    Raises:
        UserError: fewer than three descriptors, or of fewer than three numbers.
    """
    if min(features.shape) < 3:
        raise UserError(f"descriptors {features.shape} make no map; expected at least (3, 3)")
    points = np.array(features, np.float32)
    if normalize:
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-30)
    points -= points.mean(0)
    start = np.ones(min(points.shape), np.float32)
    left, scale, _ = scipy.sparse.linalg.svds(points, k=2, v0=start)
    placed = (left * scale)[:, ::-1].astype(np.float64)  # svds gives the smaller first
    placed *= np.where(placed.max(0) < -placed.min(0), -1, 1)
    total = float(np.square(points, dtype=np.float64).sum())
    return placed, np.square(scale[::-1].astype(np.float64)) / max(total, 1e-30)

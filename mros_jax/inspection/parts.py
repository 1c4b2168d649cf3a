"""Parts of a descriptor: which there are, where in the image, and what each adds to a distance."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax.errors import UserError
from mros_jax.models.outputs import Part
from mros_jax.runs.run import Run


def list_parts(run: Run) -> tuple[Part, ...]:
    """What a run's descriptor is made of, as the network says."""
    config = ConfigDict(run.config)
    return configs.make_network(config, 2).parts(*configs.find_size(config, config.eval))


def list_edges(parts: Sequence[Part]) -> dict[str, list[tuple[float, float]]]:
    """Group -> top and bottom of its parts as shares of the image's height, in order."""
    edges: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        edges.setdefault(part.group, []).append((part.top, part.bottom))
    return edges


def split_distance(
    query: Shaped[np.ndarray, "D"], gallery: Shaped[np.ndarray, "D"], parts: Sequence[Part]
) -> dict[str, list[float]]:
    """What each part of the descriptor adds to the cosine distance of two of them.

    The cosine distance of unit vectors a and b is `|a - b|^2 / 2`, a sum over their entries, and
    the descriptor is the concatenation of its parts: the sum over the parts is the distance,
    exactly.

    Args:
        query: a descriptor.
        gallery: a descriptor.
        parts: what they are made of, in order.

    Returns:
        group -> what its parts add, in order, all >= 0.

    Raises:
        UserError: the descriptor has another length than the parts together.
    """
    if sum(part.size for part in parts) != len(query):
        sizes = [part.size for part in parts]
        raise UserError(f"a descriptor of {len(query)} numbers does not consist of parts {sizes}")
    a, b = (np.asarray(x, np.float64) for x in (query, gallery))
    entries = np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)) / 2
    sums = np.add.reduceat(entries, np.cumsum([0, *(part.size for part in parts[:-1])]))
    result: dict[str, list[float]] = {}
    for part, value in zip(parts, sums, strict=True):
        result.setdefault(part.group, []).append(float(value))
    return result

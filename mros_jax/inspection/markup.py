"""Templates of pages: the ranked lists that all of them show, and how numbers are written."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Shaped

from mros_jax.inspection.parts import split_distance
from mros_jax.inspection.pictures import name_image
from mros_jax.inspection.ranking import Entry
from mros_jax.models.outputs import Part

_NAMES = {"plain": "Plain", "ecn": "ECN", "k_reciprocal": "k-reciprocal", "aqe": "AQE"}


def make_environment(*packages: str) -> jinja2.Environment:
    """Templates of packages, which can import `lists.html` of this one."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name, ".") for name in (*packages, "mros_jax.inspection")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = format_percent
    return environment


def format_percent(value: float | None, digits: int = 1) -> str:
    """A share of 1 in percent, without the sign; a dash for None or NaN."""
    return "–" if value is None or np.isnan(value) else f"{100 * value:.{digits}f}"


def show_name(ranking: str) -> str:
    """What a reader sees of a ranking's name in results.json."""
    return _NAMES.get(ranking, ranking)


def describe_query(
    features: Mapping[str, np.ndarray], query: int, picture: str | None
) -> dict[str, Any]:
    """What `lists.html` shows of a query, all but its lists.

    Args:
        features: the arrays of `features.npz`.
        query: its row.
        picture: data URI of its thumbnail; None: there is none.
    """
    return {
        "picture": picture,
        "name": name_image(features, "query", query),
        "camera": int(features["query_camids"][query]),
        "pid": int(features["query_pids"][query]),
    }


def describe_entry(
    features: Mapping[str, np.ndarray],
    descriptor: Shaped[np.ndarray, "D"],
    entry: Entry,
    parts: Sequence[Part],
    pictures: Mapping[int, str],
) -> dict[str, Any]:
    """What `lists.html` shows of an image in a ranked list.

    Args:
        features: the arrays of `features.npz`.
        descriptor: of the query.
        entry: the image.
        parts: what descriptors are made of.
        pictures: row of the gallery -> data URI of its thumbnail.
    """
    added = split_distance(descriptor, features["gallery_features"][entry.index], parts)
    return {
        "picture": pictures.get(entry.index),
        "name": name_image(features, "gallery", entry.index),
        "camera": int(features["gallery_camids"][entry.index]),
        "pid": int(features["gallery_pids"][entry.index]),
        "rank": entry.rank,
        "distance": entry.distance,
        "status": entry.status,
        "reason": entry.reason,
        "parts": {group: np.round(x, 6).tolist() for group, x in added.items()},
    }

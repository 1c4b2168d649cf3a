"""Descriptors of a data set's queries and gallery, bound to the weights and images they are of."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mros_jax.data.fingerprint import fingerprint_split
from mros_jax.data.splits import Dataset
from mros_jax.data.store import ImageStore


def extract_features(
    embed_all: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    query: ImageStore,
    gallery: ImageStore,
    *,
    checkpoint_id: str,
    flip_test: bool,
    crops: str,
    count_multiply_adds: Callable[[], Mapping[str, int]],
    heads: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Compute the descriptors of a data set's queries and gallery.

    Args:
        embed_all: uint8 images (N, H, W, 3) to descriptors (N, D) by name, "descriptor" and exits.
        query: decoded query images.
        gallery: decoded gallery images.
        checkpoint_id: names the weights.
        flip_test: whether `embed_all` takes the mean over image and mirror image.
        crops: of images that it takes the mean over, "none" or "ten".
        count_multiply_adds: gives what each descriptor takes; asked where there are exits.
        heads: what the network compares pairs with, if it does.

    Returns:
        The arrays of `mros_jax.retrieval.descriptors.ARRAYS`; those of the network's exits, and its
        heads, as `mros_jax.retrieval.descriptors` describes them; `query_names` and
        `gallery_names`;
        and what the descriptors are of: `checkpoint_id`, `flip_test`, `crops`,
        `query_fingerprint`, `gallery_fingerprint`.
    """
    arrays = {
        "checkpoint_id": np.asarray(checkpoint_id),
        "flip_test": np.asarray(flip_test),
        "crops": np.asarray(crops),
        **(heads or {}),
    }
    exits: list[str] = []
    for name, store in (("query", query), ("gallery", gallery)):
        made = embed_all(store.images)
        exits = [other for other in made if other != "descriptor"]
        arrays[f"{name}_features"] = np.asarray(made["descriptor"], np.float32)
        for other in exits:
            arrays[f"{name}_exit_{other}"] = np.asarray(made[other], np.float32)
        arrays[f"{name}_pids"] = np.asarray(store.split.pids)
        arrays[f"{name}_camids"] = np.asarray(store.split.camids)
        arrays[f"{name}_names"] = np.asarray(store.split.names, np.str_)
        arrays[f"{name}_fingerprint"] = np.asarray(store.fingerprint)
    if exits:
        counts = count_multiply_adds()
        exits.sort(key=lambda exit: counts[exit])
        arrays["exits"] = np.asarray(exits, np.str_)
        in_order = [counts[name] for name in (*exits, "descriptor")]
        arrays["multiply_adds"] = np.asarray(in_order, np.int64)
    return arrays


def fingerprint(dataset: Dataset, *, progress: bool = False) -> dict[str, str]:
    """Split -> fingerprint, of all splits of a data set."""
    return {split.name: fingerprint_split(split, progress=progress) for split in dataset.splits}


def find_change(
    saved: Mapping[str, Any],
    *,
    checkpoint_id: str,
    flip_test: bool,
    crops: str,
    fingerprints: Mapping[str, str],
) -> str | None:
    """Why saved descriptors are not those asked for; None where they are.

    Args:
        saved: as `extract_features` returns them.
        checkpoint_id: names the weights.
        flip_test: whether means over image and mirror image are asked for.
        crops: of images that means over are asked for, "none" or "ten".
        fingerprints: of the splits "query" and "gallery".
    """
    found = str(saved.get("checkpoint_id", "unknown"))
    if found != checkpoint_id:
        return f"they are of checkpoint {found}, not {checkpoint_id}"
    if bool(saved.get("flip_test", False)) != flip_test:
        return f"they were made {'without' if flip_test else 'with'} the flip test"
    if (theirs := str(saved.get("crops", "none"))) != crops:
        return f"they were made with crops {theirs!r}, not {crops!r}"
    for split in ("query", "gallery"):
        if str(saved.get(f"{split}_fingerprint", "")) != fingerprints[split]:
            return f"the {split} images are others"
    return None

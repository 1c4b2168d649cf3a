"""Evaluates a trained model, or descriptors from anywhere.

    python -m mros_jax.evaluate --checkpoint runs/market --rerank=ecn --flip_test
    python -m mros_jax.evaluate --features features.npz --rerank=ecn,k_reciprocal --json
    python -m mros_jax.evaluate --query_features q.npz --gallery_features g.npz

Descriptors of a checkpoint are kept in its run and computed again only if the checkpoint, the data
set or the flip test is another. docs/evaluation.md says what the files hold.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax import provenance
from mros_jax.data.splits import Dataset
from mros_jax.data.store import ImageStore, load_store
from mros_jax.retrieval import evaluate, files

FORMAT = 1
log = logging.getLogger(__name__)


def extract_features(
    embed: Callable[[np.ndarray], np.ndarray],
    dataset: Dataset,
    *,
    height: int,
    width: int,
    cache_dir: str | os.PathLike | None = None,
    on_bad_image: str = "error",
    stores: Sequence[ImageStore] | None = None,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Compute the descriptors of a data set's queries and gallery.

    Args:
        embed: uint8 images (N, H, W, 3) to descriptors (N, D).
        dataset: gives the splits.
        height: common image height, where images differ in size.
        width: common image width.
        cache_dir: where decoded images are kept.
        on_bad_image: "error" or "skip".
        stores: images of queries and gallery, where they are loaded already.
        progress: show progress bars.

    Returns:
        The arrays of `mros_jax.retrieval.files.ARRAYS`, and `query_names`, `gallery_names`.
    """
    if stores is None:
        stores = [
            load_store(
                split,
                height=height,
                width=width,
                cache_dir=cache_dir,
                on_bad_image=on_bad_image,  # type: ignore[arg-type]
                progress=progress,
            )
            for split in (dataset.query, dataset.gallery)
        ]
    arrays = {}
    for name, store in zip(("query", "gallery"), stores, strict=True):
        arrays[f"{name}_features"] = np.asarray(embed(store.images), np.float32)
        arrays[f"{name}_pids"] = np.asarray(store.split.pids)
        arrays[f"{name}_camids"] = np.asarray(store.split.camids)
        arrays[f"{name}_names"] = np.asarray(store.split.names, np.str_)
    return arrays


def evaluate_features(
    features: Mapping[str, np.ndarray],
    *,
    dataset: str | None,
    reranks: Sequence[str] = ("ecn",),
    rerank_options: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str = "cosine",
    normalize: bool = True,
    ap: str = "standard",
    max_rank: int = 50,
    flip_test: bool | None = None,
    keep_junk: bool = False,
    distractor_pid: int | None = 0,
    setting: str | None = None,
    seed: int | None = None,
    step: int | None = None,
    epoch: int | None = None,
) -> dict[str, Any]:
    """Evaluate descriptors without and with re-ranking.

    Args:
        features: as `extract_features` returns them.
        dataset: name of the data set, for the protocol; None if unknown.
        reranks: names of `mros_jax.retrieval.rerank.METHODS`, besides the plain ranking.
        rerank_options: keyword arguments of each.
        metric: "cosine" or "euclidean".
        normalize: divide descriptors by their norm.
        ap: "standard" or "trapezoid".
        max_rank: length of the CMC curve.
        flip_test: whether the descriptors are means over image and mirror image; None if unknown.
        keep_junk: let junk take part in re-ranking.
        distractor_pid: the pid that never matches, None if there is none.
        setting: setting of the model (I-IV).
        seed: seed of the run.
        step: training steps done.
        epoch: epochs done.

    Returns:
        The content of results.json: `format`, `run`, `dataset` and `results`, one for each ranking;
        metrics are fractions of 1.

    Raises:
        ValueError: as `mros_jax.retrieval.evaluate`.
    """
    commit = provenance.get_commit()
    own = {"dataset": dataset, "flip_test": flip_test, "commit": commit, "seed": seed}
    results = []
    for name in (None, *reranks):
        result = evaluate(
            *(features[array] for array in files.ARRAYS),
            metric=metric,
            normalize=normalize,
            ap=ap,
            max_rank=max_rank,
            rerank=name,
            rerank_options=(rerank_options or {}).get(name) if name else None,
            keep_junk=keep_junk,
            distractor_pid=distractor_pid,
            protocol=own,
        )
        log.info("%s: %s", name or "plain", result)
        results.append({"name": name or "plain", "rerank": name, **result.to_dict()})
    protocol = results[0]["protocol"]
    run = {"setting": setting, "seed": seed, "step": step, "epoch": epoch, "commit": commit}
    sizes = ("num_query", "num_valid_queries", "num_gallery", "num_junk", "num_distractors")
    return {
        "format": FORMAT,
        "run": run,
        "dataset": {"name": dataset, **{key: protocol[key] for key in sizes}},
        "results": results,
    }


def evaluate_dataset(
    embed: Callable[[np.ndarray], np.ndarray],
    dataset: Dataset,
    *,
    height: int,
    width: int,
    cache_dir: str | os.PathLike | None = None,
    on_bad_image: str = "error",
    stores: Sequence[ImageStore] | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Both in one: `extract_features`, then `evaluate_features` with `options`."""
    features = extract_features(
        embed,
        dataset,
        height=height,
        width=width,
        cache_dir=cache_dir,
        on_bad_image=on_bad_image,
        stores=stores,
        progress=progress,
    )
    return evaluate_features(features, dataset=dataset.name, **options)

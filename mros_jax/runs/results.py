"""Results of an evaluation: what results.json holds, how it is made and read."""

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax.errors import UserError
from mros_jax.files import read_json
from mros_jax.retrieval import descriptors, evaluate, rerank
from mros_jax.retrieval.blocks import EVERYWHERE, Placement
from mros_jax.runs import provenance

FORMAT = 1
RANKS = (1, 5, 10)  # those that tables show
log = logging.getLogger(__name__)


def evaluate_features(
    features: Mapping[str, np.ndarray],
    *,
    dataset: str | None,
    reranks: Sequence[rerank.Rerank] = (rerank.ECN(),),
    metric: str = "cosine",
    normalize: bool = True,
    ap: str = "standard",
    max_rank: int = 50,
    flip_test: bool | None = None,
    crops: str | None = None,
    descriptor: str = "descriptor",
    exits: bool = True,
    keep_junk: bool = False,
    distractor_pid: int | None = 0,
    system: str | None = None,
    seed: int | None = None,
    step: int | None = None,
    epoch: int | None = None,
    placement: Placement = EVERYWHERE,
) -> dict[str, Any]:
    """Evaluate descriptors without and with re-ranking, and those of exits without.

    Args:
        features: the arrays of `mros_jax.retrieval.descriptors.ARRAYS`, and those of exits.
        dataset: name of the data set, for the protocol; None if unknown.
        reranks: ways to re-rank, besides the plain ranking; learned ones take what they need from
            `features`.
        metric: "cosine" or "euclidean".
        normalize: divide descriptors by their norm.
        ap: "standard" or "trapezoid".
        max_rank: length of the CMC curve.
        flip_test: whether the descriptors are means over image and mirror image; None if unknown.
        crops: of images that they are means over, "none" or "ten"; None if unknown.
        descriptor: which of a network's descriptors they are, "descriptor" or an exit.
        exits: evaluate those of exits too, where there are any.
        keep_junk: let junk take part in re-ranking.
        distractor_pid: the pid that never matches, None if there is none.
        system: the method that made the descriptors, as the paper's tables know it.
        seed: seed of the run.
        step: completed training steps.
        epoch: completed epochs.
        placement: devices and block size, and whether processes work together.

    Returns:
        The content of results.json: `format`, `run`, `dataset`, `arithmetic` and `results`, one
        entry for each ranking; with exits `exits`, a plain ranking for each and for the descriptor,
        with its `size` and `multiply_adds`. Metrics are fractions of 1.

    Raises:
        UserError: as `mros_jax.retrieval.evaluate`.
    """
    nobody = np.count_nonzero(np.asarray(features["query_pids"]) == distractor_pid)
    if distractor_pid is not None and nobody:
        log.warning(
            "%d of %d queries have pid %d, which means distractor, and do not count; where it is a "
            "person, evaluate with --no_distractors (distractor_pid=None)",
            nobody,
            len(features["query_pids"]),
            distractor_pid,
        )
    commit = provenance.get_commit()
    own = {
        "dataset": dataset,
        "flip_test": flip_test,
        "crops": crops,
        "descriptor": descriptor,
        "commit": commit,
        "seed": seed,
    }
    reranks = [wanted.bind(features) for wanted in reranks]
    junk = 0 if keep_junk else np.count_nonzero(features["gallery_pids"] == -1)
    for wanted in reranks:
        wanted.check(len(features["query_pids"]), len(features["gallery_pids"]) - int(junk))
    run_evaluation = functools.partial(
        evaluate,
        metric=metric,
        normalize=normalize,
        ap=ap,
        max_rank=max_rank,
        keep_junk=keep_junk,
        distractor_pid=distractor_pid,
        placement=placement,
    )
    main = [features[array] for array in descriptors.ARRAYS]
    results = []
    for method in (None, *reranks):
        name = None if method is None else method.name
        result = run_evaluation(*main, rerank=method, protocol=own)
        log.info("%s: %s", name or "plain", result)
        results.append({"name": name or "plain", "rerank": name, **result.to_dict()})
    by_exit = []
    for name in descriptors.list_exits(features) if exits else ():
        chosen = descriptors.choose_descriptor(features, name)
        arrays = [chosen[array] for array in descriptors.ARRAYS]
        result = run_evaluation(*arrays, protocol={**own, "descriptor": name})
        log.info("%s: %s", name, result)
        by_exit.append(_describe_exit(name, arrays[0], result.to_dict()))
    if by_exit:
        by_exit.append(_describe_exit(descriptor, main[0], results[0]))
        for entry, count in zip(by_exit, features["multiply_adds"], strict=True):
            entry["multiply_adds"] = int(count)
    protocol = results[0]["protocol"]
    run = {"system": system, "seed": seed, "step": step, "epoch": epoch, "commit": commit}
    sizes = ("num_query", "num_valid_queries", "num_gallery", "num_junk", "num_distractors")
    return {
        "format": FORMAT,
        "run": run,
        "dataset": {"name": dataset, **{key: protocol[key] for key in sizes}},
        "arithmetic": provenance.describe_arithmetic(),
        "results": results,
        **({"exits": by_exit} if by_exit else {}),
    }


def _describe_exit(name: str, features: np.ndarray, result: Mapping[str, Any]) -> dict[str, Any]:
    scores = {key: result[key] for key in ("mAP", "mINP", "cmc", "protocol")}
    return {"name": name, "size": features.shape[1], **scores}


def get_rank(entry: Mapping[str, Any], k: int) -> float | None:
    """Rank-k of one entry of results.json, as a fraction of 1; None beyond what was computed."""
    cmc = entry["cmc"]
    return cmc[k - 1] if k <= len(cmc) else None


def get_scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """mAP, mINP and rank1, rank5, rank10 of one entry, as far as they were computed."""
    scores = {"mAP": entry["mAP"], "mINP": entry["mINP"]}
    ranks = {f"rank{k}": get_rank(entry, k) for k in RANKS}
    return scores | {name: value for name, value in ranks.items() if value is not None}


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        NotFoundError: there is none.
        UserError: it is damaged, something else, or of another version; says how to go on.
    """
    way_out = "remove it, and write it anew with python -m mros_jax.evaluate ... --out"
    try:
        results = read_json(path)
    except UserError as error:
        if os.path.exists(path):
            raise UserError(f"{error}; {way_out}") from error
        raise
    if not isinstance(results, dict) or "results" not in results or "run" not in results:
        raise UserError(f"{path} is no results.json: it has no 'run' and 'results'")
    if results.get("format") != FORMAT:
        raise UserError(f"{path} has format {results.get('format')!r}; this version reads {FORMAT}")
    fault = _find_fault(results)
    if fault:
        raise UserError(f"{path} is damaged: {fault}; {way_out}")
    return results


def _find_fault(results: Mapping[str, Any]) -> str | None:
    """What keeps results from being those that this module writes."""
    entries = results["results"]
    if not isinstance(results["run"], dict) or not isinstance(results.get("dataset"), dict):
        return "'run' and 'dataset' must be objects"
    if not isinstance(entries, list) or not entries:
        return "'results' must be a list with a ranking or more"
    faults = [_find_entry_fault(f"results[{i}]", entry) for i, entry in enumerate(entries)]
    exits = results.get("exits", [])
    if not isinstance(exits, list):
        return "'exits' must be a list of rankings"
    for i, entry in enumerate(exits):
        faults.append(_find_entry_fault(f"exits[{i}]", entry))
        for name in ("size", "multiply_adds"):
            if faults[-1] is None and not isinstance(entry.get(name), int):
                return f"exits[{i}].{name} is {entry.get(name)!r}; expected a whole number"
    return next(filter(None, faults), None)


def _find_entry_fault(where: str, entry: Any) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return f"{where} must be an object with a name"
    if not isinstance(entry.get("protocol"), dict):
        return f"{where} must have a protocol"
    cmc = entry.get("cmc")
    if not isinstance(cmc, list) or not cmc:
        return f"{where}.cmc must be a list of numbers"
    for name, value in (("mAP", entry.get("mAP")), *(("cmc", value) for value in cmc)):
        if not _is_share(value):
            return f"{where}.{name} is {value!r}; expected a fraction of 1"
    return None


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1

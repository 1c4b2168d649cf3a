"""Evaluates a trained model, or descriptors from anywhere.

    python -m mros_jax.evaluate --checkpoint runs/market --rerank=ecn --flip_test
    python -m mros_jax.evaluate --features features.npz --rerank=ecn,k_reciprocal --json
    python -m mros_jax.evaluate --query_features q.npz --gallery_features g.npz

Descriptors of a checkpoint are kept in its run and computed again only if the checkpoint, the data
set or the flip test is another. docs/evaluation.md says what the files hold.
"""

import argparse
import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mros_jax import console, parallel
from mros_jax.data.datasets.splits import Dataset
from mros_jax.data.store import ImageStore
from mros_jax.errors import UserError
from mros_jax.files import write_json
from mros_jax.retrieval import Result, bootstrap, descriptors, evaluate, rerank, verify
from mros_jax.retrieval.distances import METRICS
from mros_jax.retrieval.metrics import AP_VARIANTS
from mros_jax.runs import provenance
from mros_jax.runs.tables import format_results

FORMAT = 1
log = logging.getLogger(__name__)


def extract_features(
    embed: Callable[[np.ndarray], np.ndarray], query: ImageStore, gallery: ImageStore
) -> dict[str, np.ndarray]:
    """Compute the descriptors of a data set's queries and gallery.

    Args:
        embed: uint8 images (N, H, W, 3) to descriptors (N, D).
        query: decoded query images.
        gallery: decoded gallery images.

    Returns:
        The arrays of `mros_jax.retrieval.descriptors.ARRAYS`, and `query_names`, `gallery_names`.
    """
    arrays = {}
    for name, store in (("query", query), ("gallery", gallery)):
        arrays[f"{name}_features"] = np.asarray(embed(store.images), np.float32)
        arrays[f"{name}_pids"] = np.asarray(store.split.pids)
        arrays[f"{name}_camids"] = np.asarray(store.split.camids)
        arrays[f"{name}_names"] = np.asarray(store.split.names, np.str_)
    return arrays


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
    keep_junk: bool = False,
    distractor_pid: int | None = 0,
    system: str | None = None,
    seed: int | None = None,
    step: int | None = None,
    epoch: int | None = None,
) -> dict[str, Any]:
    """Evaluate descriptors without and with re-ranking.

    Args:
        features: as `extract_features` returns them.
        dataset: name of the data set, for the protocol; None if unknown.
        reranks: ways to re-rank, besides the plain ranking.
        metric: "cosine" or "euclidean".
        normalize: divide descriptors by their norm.
        ap: "standard" or "trapezoid".
        max_rank: length of the CMC curve.
        flip_test: whether the descriptors are means over image and mirror image; None if unknown.
        keep_junk: let junk take part in re-ranking.
        distractor_pid: the pid that never matches, None if there is none.
        system: the system's name, as the paper's tables have it.
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
    junk = 0 if keep_junk else np.count_nonzero(features["gallery_pids"] == -1)
    for wanted in reranks:
        wanted.check(len(features["query_pids"]), len(features["gallery_pids"]) - int(junk))
    results = []
    for method in (None, *reranks):
        name = None if method is None else method.name
        result = evaluate(
            *(features[array] for array in descriptors.ARRAYS),
            metric=metric,
            normalize=normalize,
            ap=ap,
            max_rank=max_rank,
            rerank=method,
            keep_junk=keep_junk,
            distractor_pid=distractor_pid,
            protocol=own,
        )
        log.info("%s: %s", name or "plain", result)
        results.append({"name": name or "plain", "rerank": name, **result.to_dict()})
    protocol = results[0]["protocol"]
    run = {"system": system, "seed": seed, "step": step, "epoch": epoch, "commit": commit}
    sizes = ("num_query", "num_valid_queries", "num_gallery", "num_junk", "num_distractors")
    return {
        "format": FORMAT,
        "run": run,
        "dataset": {"name": dataset, **{key: protocol[key] for key in sizes}},
        "results": results,
    }


def load_run_features(
    run: str | os.PathLike,
    *,
    checkpoint: str = "last",
    dataset: str | None = None,
    root: str | None = None,
    flip_test: bool = False,
    batch_size: int = 128,
    progress: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Descriptors of a run's checkpoint: those saved in the run if they still fit, else new ones.

    They are kept as `features.npz` in the run (`features-DATASET.npz`, `features-flip.npz` for
    another data set or the flip test), with the checkpoint's id and the image names.

    Args:
        run: directory of the run.
        checkpoint: "last" or "best".
        dataset: another data set than the run's.
        root: its directory; with the run's own data set, where that is now.
        flip_test: mean of the descriptors of image and mirror image.
        batch_size: images in a batch.
        progress: show progress bars.

    Returns:
        The arrays, and the keyword arguments of `evaluate_features` that describe them.

    Raises:
        FileNotFoundError: no run, no checkpoint, no data set.
    """
    from mros_jax import config as configs
    from mros_jax.data.datasets.sources import load_dataset
    from mros_jax.inference import load_model

    model = load_model(run, checkpoint)
    config = model.config
    assert config is not None  # a model that was loaded from a run has one
    with config.unlocked():
        if root is not None:
            config.dataset.root = root
    own = dataset in (None, config.dataset.name)
    data = configs.load_dataset(config) if own else load_dataset(dataset, root)  # type: ignore[arg-type]
    words = ["features", *([] if own else [data.name]), *(["flip"] if flip_test else [])]
    path = pathlib.Path(run) / f"{'-'.join(words)}.npz"
    described = {
        "dataset": data.name,
        "flip_test": flip_test,
        "system": config.name,
        "seed": config.seed,
    }
    if path.exists():
        skipping = config.dataset.on_bad_image == "skip"
        try:
            saved = descriptors.load_features(path)
            why = _find_change(saved, data, model.checkpoint_id, skipping)
        except ValueError as error:
            why = str(error)
        if why is None:
            log.info("Descriptors of %s are those saved in %s", model.checkpoint_id, path)
            return saved, described
        log.info("Computing descriptors again, since %s (%s)", why, path)
    features = extract_features(
        functools.partial(
            model.embed, batch_size=batch_size, flip_test=flip_test, progress=progress
        ),
        configs.load_images(config, data.query, progress=progress),
        configs.load_images(config, data.gallery, progress=progress),
    )
    features["checkpoint_id"] = np.asarray(model.checkpoint_id)
    descriptors.save_features(path, features)
    return features, described


def _find_change(
    saved: Mapping[str, np.ndarray], data: Dataset, checkpoint_id: str, skipping: bool
) -> str | None:
    """Why saved descriptors are not those asked for, or None."""
    if str(saved.get("checkpoint_id", "")) != checkpoint_id:
        return f"the checkpoint is another: {checkpoint_id}"
    for name, split in (("query", data.query), ("gallery", data.gallery)):
        if skipping:  # bad images have no descriptors
            split = split.select(np.flatnonzero(np.isin(split.names, saved[f"{name}_names"])))
        wanted = {"names": split.names, "pids": split.pids, "camids": split.camids}
        for field, array in wanted.items():
            if not np.array_equal(saved.get(f"{name}_{field}", ()), array):
                return f"the {name} images are others"
    return None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.evaluate",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_argument_group("what is evaluated")
    source.add_argument("--checkpoint", metavar="RUN", help="directory of a training run")
    source.add_argument("--which", choices=("last", "best"), default="last", help="its checkpoint")
    source.add_argument("--dataset", help="data set (default: the run's)")
    source.add_argument("--root", help="directory of the data set (default: the run's)")
    source.add_argument("--flip_test", action="store_true", help="mean of image and mirror image")
    source.add_argument("--batch_size", type=int, default=128, help="images in a batch")
    source.add_argument(
        "--features", metavar="NPZ", help=f"file with {', '.join(descriptors.ARRAYS)}"
    )
    source.add_argument("--query_features", metavar="NPZ", help="file: features, pids, camids")
    source.add_argument("--gallery_features", metavar="NPZ", help="file: features, pids, camids")
    how = parser.add_argument_group("protocol")
    how.add_argument("--metric", choices=METRICS, default="cosine")
    how.add_argument("--unnormalized", action="store_true", help="use descriptors as they are")
    how.add_argument("--ap", choices=AP_VARIANTS, default="standard")
    how.add_argument("--max_rank", type=int, default=50, help="length of the CMC curve")
    how.add_argument("--keep_junk", action="store_true", help="junk takes part in re-ranking")
    how.add_argument(
        "--no_distractors", action="store_true", help="pid 0 is a person, not a distractor"
    )
    how.add_argument(
        "--rerank", default="", metavar="A,B", help=f"any of {', '.join(rerank.METHODS)}"
    )
    how.add_argument(
        "--rerank_options", default="{}", metavar="JSON", help='e.g. {"ecn": {"k": 20, "t": 3}}'
    )
    how.add_argument(
        "--neighbors",
        default="exact",
        help="search for ecn and k_reciprocal: exact, faiss, or e.g. faiss:IVF1024,Flat",
    )
    more = parser.add_argument_group("further scores")
    more.add_argument("--verification", action="store_true", help="ROC, EER, TPR@FPR, DIR@FAR")
    more.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="95 %% intervals from N resamples"
    )
    more.add_argument("--bootstrap_by", choices=bootstrap.UNITS, default="identity")
    more.add_argument("--bootstrap_seed", type=int, default=0)
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print JSON, as in results.json")
    out.add_argument("--out", metavar="FILE", help="also write the JSON to a file")
    out.add_argument("--no_progress", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    pair = (args.query_features is not None, args.gallery_features is not None)
    if pair[0] != pair[1]:
        parser.error("--query_features and --gallery_features go together")
    if [args.checkpoint is not None, args.features is not None, all(pair)].count(True) != 1:
        parser.error(
            "give one of --checkpoint RUN, --features FILE, or --query_features with "
            "--gallery_features"
        )
    if args.checkpoint is None and args.flip_test:
        parser.error("--flip_test needs --checkpoint: features are taken as they are")
    try:
        args.rerank = _parse_rerank(args.rerank, args.rerank_options, args.neighbors)
    except UserError as error:
        parser.error(str(error))
    return args


def _parse_rerank(names: str, options: str, neighbors: str) -> tuple[rerank.Rerank, ...]:
    """The re-rankings that --rerank, --rerank_options and --neighbors ask for."""
    wanted = [name for name in names.split(",") if name]
    try:
        values = json.loads(options)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"--rerank_options is not JSON: {error}") from error
    rerank.parse(wanted, values)
    for name in values:
        if name not in wanted:
            raise UserError(f"--rerank_options has parameters of {name}; add it to --rerank")
    if neighbors != "exact":
        searching = [name for name in wanted if name != "aqe"]
        if not searching:
            raise UserError(f"--neighbors={neighbors} needs --rerank=ecn or k_reciprocal")
        values |= {name: {"neighbors": neighbors} | values.get(name, {}) for name in searching}
    return rerank.parse(wanted, values)


def _load(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if args.checkpoint is not None:
        return load_run_features(
            args.checkpoint,
            checkpoint=args.which,
            dataset=args.dataset,
            root=args.root,
            flip_test=args.flip_test,
            batch_size=args.batch_size,
            progress=not args.no_progress,
        )
    if args.features is not None:
        return descriptors.load_features(args.features), {"dataset": args.dataset}
    return (
        descriptors.load_feature_pair(args.query_features, args.gallery_features),
        {"dataset": args.dataset},
    )


def _run(args: argparse.Namespace) -> dict[str, Any]:
    features, described = _load(args)
    distractor_pid = None if args.no_distractors else 0
    results = evaluate_features(
        features,
        reranks=args.rerank,
        metric=args.metric,
        normalize=not args.unnormalized,
        ap=args.ap,
        max_rank=args.max_rank,
        keep_junk=args.keep_junk,
        distractor_pid=distractor_pid,
        **described,
    )
    if args.bootstrap:
        for entry in results["results"]:
            intervals = bootstrap.estimate_intervals(
                Result.from_dict(entry),
                rng=np.random.default_rng(args.bootstrap_seed),
                samples=args.bootstrap,
                by=args.bootstrap_by,
            )
            entry["intervals"] = {
                "by": args.bootstrap_by,
                "confidence": 0.95,
                "samples": args.bootstrap,
                "seed": args.bootstrap_seed,
                **intervals,
            }
    if args.verification:
        verified = verify(
            *(features[name] for name in descriptors.ARRAYS),
            metric=args.metric,
            normalize=not args.unnormalized,
            distractor_pid=distractor_pid,
        )
        results["verification"] = verified.to_dict()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(argv)
    console.show_messages()
    parallel.use_compilation_cache()
    try:
        results = _run(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        write_json(args.out, results)
    print(json.dumps(results) if args.json else format_results(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

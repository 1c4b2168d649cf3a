"""Evaluate a trained model, or descriptors from anywhere.

    python -m mros_jax.evaluate --run runs/market --rerank=ecn --flip_test
    python -m mros_jax.evaluate --features features.npz --rerank=ecn,k_reciprocal --json
    python -m mros_jax.evaluate --query_features q.npz --gallery_features g.npz

Descriptors of a run are kept in it and computed again only if the weights, the images, the flip
test or the crops are others. docs/evaluation.md says what the files hold.
"""

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.data.datasets import sources
from mros_jax.data.fingerprint import fingerprint_split
from mros_jax.errors import UserError
from mros_jax.files import check_output, write_json
from mros_jax.inference import CROPS, choose_test, load_model
from mros_jax.retrieval import Placement, Result, bootstrap, descriptors, rerank, verify
from mros_jax.retrieval.distances import METRICS
from mros_jax.retrieval.metrics import AP_VARIANTS
from mros_jax.runs.checkpoints import NAMES
from mros_jax.runs.features import extract_features, find_change
from mros_jax.runs.results import evaluate_features
from mros_jax.runs.run import Run
from mros_jax.runs.tables import format_results

log = logging.getLogger(__name__)


def load_run_features(
    path: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    dataset: str | None = None,
    root: str | None = None,
    flip_test: bool | None = None,
    crops: str | None = None,
    batch_size: int = 128,
    progress: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load the descriptors of a run's checkpoint: those saved if they fit, else new ones.

    They fit where weights, images (by content, not by name), flip test and crops are the same.
    They are kept as `features.npz` in the run; those of other images, another checkpoint, the flip
    test or crops in files of their own. In a run of several processes all must call this.

    Args:
        path: directory of the run.
        checkpoint: "last" or "best".
        dataset: another data set than the run's.
        root: its directory; with the run's own data set, where that is now.
        flip_test: mean of the descriptors of image and mirror image; None: as the run.
        crops: "ten": mean of the descriptors of ten crops, or "none"; None: as the run.
        batch_size: images in a batch.
        progress: show progress bars.

    Returns:
        The arrays, and the keyword arguments of `evaluate_features` that describe them.

    Raises:
        NotFoundError: no run, no checkpoint, no data set.
        UserError: one of them is damaged, or of another version.
    """
    run = parallel.run_on_all(lambda: Run.open(path))
    config = ConfigDict(run.config)
    if root is not None:
        config.dataset.root = root
    flip_test, crops = choose_test(config.eval, flip_test, crops)
    own = dataset in (None, config.dataset.name)
    data = parallel.run_on_all(
        lambda: configs.load_dataset(config) if own else sources.load_dataset(str(dataset), root)
    )
    model = parallel.run_on_all(lambda: load_model(run.path, checkpoint))
    fingerprints = parallel.from_main(
        lambda: {
            split.name: fingerprint_split(split, progress=progress)
            for split in (data.query, data.gallery)
        }
    )
    file = run.features_file(
        data.name, fingerprints, flip_test=flip_test, crops=crops, checkpoint=checkpoint
    )
    _, step, _ = model.checkpoint_id.split("-")
    described = {
        "dataset": data.name,
        "flip_test": flip_test,
        "crops": crops,
        "system": run.system,
        "seed": config.seed,
        "step": int(step),
        "epoch": int(step) // run.steps_per_epoch,
    }
    made_with: dict[str, Any] = {
        "checkpoint_id": model.checkpoint_id,
        "flip_test": flip_test,
        "crops": crops,
    }

    def find_saved() -> dict[str, np.ndarray] | None:
        if not file.exists():
            return None
        try:
            saved = descriptors.load_features(file)
            why = find_change(saved, fingerprints=fingerprints, **made_with)
        except UserError as error:
            why = str(error)
        if why is None:
            log.info("Descriptors of %s are those saved in %s", model.checkpoint_id, file)
            return saved
        log.info("Computing descriptors again instead of taking those of %s: %s", file, why)
        return None

    if (saved := parallel.from_main(find_saved)) is not None:
        return saved, described
    features = extract_features(
        functools.partial(
            model.embed_all,
            batch_size=batch_size,
            flip_test=flip_test,
            crops=crops,
            progress=progress,
            together=True,
        ),
        configs.load_images(config, data.query, progress=progress),
        configs.load_images(config, data.gallery, progress=progress),
        **made_with,
        count_multiply_adds=model.count_multiply_adds,
        heads=model.fold_heads(),
    )
    if parallel.is_main_process():
        try:
            descriptors.save_features(file, features)
        except OSError as error:
            log.warning("Descriptors are not kept: %s", console.explain(error) or error)
    return features, described


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.evaluate",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_argument_group("what is evaluated")
    source.add_argument("--run", metavar="RUN", help="directory of a training run")
    source.add_argument("--checkpoint", choices=NAMES, default="last", help="of the run")
    source.add_argument("--dataset", help="data set (default: the run's)")
    source.add_argument("--root", help="directory of the data set (default: the run's)")
    source.add_argument(
        "--flip_test",
        action=argparse.BooleanOptionalAction,
        help="mean of image and mirror image (default: as the run)",
    )
    source.add_argument("--crops", choices=CROPS, help="mean over crops (default: as the run)")
    source.add_argument("--batch_size", type=console.count, default=128, help="images in a batch")
    source.add_argument(
        "--features",
        metavar="FILE",
        help=f".npz file with {', '.join(descriptors.ARRAYS)}; or a .mat file with "
        f"{', '.join(descriptors.MATLAB_ARRAYS)}; or a directory with NAME.npy for each array",
    )
    source.add_argument("--query_features", metavar="NPZ", help="file: features, pids, camids")
    source.add_argument("--gallery_features", metavar="NPZ", help="file: features, pids, camids")
    source.add_argument(
        "--descriptor",
        default="descriptor",
        metavar="NAME",
        help="of a network with early exits, the one to evaluate in full",
    )
    how = parser.add_argument_group("protocol")
    how.add_argument("--metric", choices=METRICS, help="default: as the run, else cosine")
    how.add_argument(
        "--unnormalized",
        action=argparse.BooleanOptionalAction,
        help="use descriptors as they are (default: as the run, else not)",
    )
    how.add_argument("--ap", choices=AP_VARIANTS, help="default: as the run, else standard")
    how.add_argument("--max_rank", type=console.count, default=50, help="length of the CMC curve")
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
        "--bootstrap", type=console.count, metavar="N", help="95 %% intervals from N resamples"
    )
    more.add_argument("--bootstrap_by", choices=bootstrap.UNITS, default="identity")
    more.add_argument("--bootstrap_seed", type=int, default=0)
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print JSON, as in results.json")
    out.add_argument("--out", metavar="FILE", help="also write the JSON to a file")
    out.add_argument("--no_progress", action="store_true", help="no progress bars")
    parallel.add_arguments(parser)
    args = parser.parse_args(argv)
    pair = (args.query_features is not None, args.gallery_features is not None)
    if pair[0] != pair[1]:
        parser.error("--query_features and --gallery_features go together")
    if [args.run is not None, args.features is not None, all(pair)].count(True) != 1:
        parser.error(
            "give one of --run RUN, --features FILE, or --query_features with --gallery_features"
        )
    for name in ("flip_test", "crops"):
        if args.run is None and getattr(args, name) is not None:
            parser.error(f"--{name} needs --run: features are taken as they are")
    args.rerank = _parse_rerank(args.rerank, args.rerank_options, args.neighbors)
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
        searching = [name for name in wanted if name in ("ecn", "k_reciprocal")]
        if not searching:
            raise UserError(f"--neighbors={neighbors} needs --rerank=ecn or k_reciprocal")
        values |= {name: {"neighbors": neighbors} | values.get(name, {}) for name in searching}
    return rerank.parse(wanted, values)


def _load(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if args.run is not None:
        return load_run_features(
            args.run,
            checkpoint=args.checkpoint,
            dataset=args.dataset,
            root=args.root,
            flip_test=args.flip_test,
            crops=args.crops,
            batch_size=args.batch_size,
            progress=parallel.is_main_process() and not args.no_progress,
        )
    given = {"dataset": args.dataset}
    if args.features is not None:
        return parallel.run_on_all(lambda: descriptors.load_features(args.features)), given
    pair = (args.query_features, args.gallery_features)
    return parallel.run_on_all(lambda: descriptors.load_feature_pair(*pair)), given


def _run(args: argparse.Namespace) -> dict[str, Any]:
    features, described = _load(args)
    if args.descriptor != "descriptor":
        features = descriptors.choose_descriptor(features, args.descriptor)
        described["descriptor"] = args.descriptor
    distractor_pid = None if args.no_distractors else 0
    saved = configs.base().eval if args.run is None else ConfigDict(Run.open(args.run).config).eval
    how = {
        "metric": saved.metric if args.metric is None else args.metric,
        "normalize": saved.normalize if args.unnormalized is None else not args.unnormalized,
    }
    results = evaluate_features(
        features,
        reranks=args.rerank,
        ap=saved.ap if args.ap is None else args.ap,
        **how,
        max_rank=args.max_rank,
        keep_junk=args.keep_junk,
        distractor_pid=distractor_pid,
        placement=Placement(together=True),
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
            **how,
            distractor_pid=distractor_pid,
        )
        results["verification"] = verified.to_dict()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parse(argv)
    parallel.use_compilation_cache()
    parallel.initialize(args.coordinator_address, args.num_processes, args.process_id)
    if args.out is not None:
        parallel.run_on_main(lambda: check_output(args.out))
    log.info("Devices: %s", parallel.describe_devices())
    results = _run(args)

    def publish() -> None:
        try:
            if args.out:
                write_json(args.out, results)
        finally:  # results are shown also where they cannot be kept
            print(json.dumps(results) if args.json else format_results(results))

    parallel.run_on_main(publish)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

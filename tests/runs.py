"""A finished run without training: random weights, evaluated on the smallest data set."""

import fcntl
import json
import pathlib
import shutil

from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import inference
from mros_jax.data.splits import Dataset
from mros_jax.files import write_json
from mros_jax.retrieval import descriptors
from mros_jax.runs import provenance
from mros_jax.runs.checkpoints import Checkpoints
from mros_jax.runs.features import extract_features, fingerprint
from mros_jax.runs.results import evaluate_features
from mros_jax.runs.run import FORMAT, Run
from mros_jax.training import recipe
from tests.training import make_config


def make_run(path: pathlib.Path, cache_dir: pathlib.Path, **overrides) -> pathlib.Path:
    """Writes all files of a run whose three epochs of training are invented."""
    config = make_config(cache_dir, report=True, **overrides)
    dataset = begin_run(path, config)
    run = Run(path)
    embedder = inference.load_model(path)
    features = extract_features(
        embedder.embed_all,
        configs.load_images(config, dataset.query, progress=False),
        configs.load_images(config, dataset.gallery, progress=False),
        checkpoint_id=embedder.checkpoint_id,
        flip_test=False,
        crops="none",
        count_multiply_adds=embedder.count_multiply_adds,
    )
    descriptors.save_features(path / "features.npz", features)
    results = evaluate_features(
        features,
        reranks=configs.make_reranks(config),
        dataset=dataset.name,
        system=config.name,
        seed=config.seed,
    )
    write_json(run.results_file, results)
    records = [
        {
            "kind": "train",
            "step": step,
            "epoch": step // 10,
            "loss": 5 / step,
            "loss/cross_entropy": 3 / step,
            "loss/triplet": 0.0 if step == 7 else 1 / step,
            "loss/center": 100 / step,
            "lr/network": 1e-3,
            "grad_norm": 1.0,
        }
        for step in range(1, 31)
    ]
    scores = {"mAP": 0.2, "mINP": 0.1, "rank1": 0.2, "rank5": 0.5, "rank10": 0.8}
    records.append({"kind": "eval", "step": 30, "epoch": 3, **scores})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    run.metrics_file.write_text(lines)
    timing = {"step": 30, "seconds": 2.0, "images_per_second": 120.0}
    run.timing_file.write_text(json.dumps(timing) + "\n")
    return path


def copy_run(path: pathlib.Path, cache_dir: pathlib.Path) -> pathlib.Path:
    """A copy of the run that `make_run` writes without overrides, made once for all workers."""
    shared = cache_dir.parent
    with (shared / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (shared / "run").exists():
            make_run(shared / "making", cache_dir).rename(shared / "run")
    return shutil.copytree(shared / "run", path)


def begin_run(path: pathlib.Path, config: ConfigDict) -> Dataset:
    """Writes what makes a directory a run, with a checkpoint of random weights; its data set."""
    dataset = configs.load_dataset(config)
    parts = recipe.build(config, dataset.num_classes, steps_per_epoch=10)
    path.mkdir(parents=True)
    run = Run(path)
    record = {"format": FORMAT, **provenance.describe_run(dataset, fingerprint(dataset))}
    write_json(run.record_file, record)
    write_json(run.config_file, config.to_dict())
    saved = Checkpoints(run.checkpoints)
    saved.save(parts.state)
    saved.close()
    return dataset

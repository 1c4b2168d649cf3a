"""A finished run without training: random weights, evaluated on the smallest data set."""

import json
import pathlib

import numpy as np

from mros_jax import evaluate, inference, train
from mros_jax.files import write_json
from mros_jax.retrieval import descriptors, rerank
from mros_jax.training import recipe
from mros_jax.training.checkpoints import Checkpoints
from mros_jax.training.optimizers import make_optimizer
from mros_jax.training.state import make_state
from tests.training import make_config


def make_run(path: pathlib.Path, cache_dir: pathlib.Path, **overrides) -> pathlib.Path:
    """Writes all files of a run whose three epochs of training are invented."""
    config = make_config(cache_dir, report=True, **overrides)
    dataset = recipe.load_dataset(config)
    model = recipe.make_model(config.model, dataset.num_classes)
    variables = recipe.init_variables(model, config)
    optimizer = make_optimizer(lambda step: 1e-3)
    path.mkdir(parents=True)
    write_json(path / "config.json", config.to_dict())
    write_json(path / "run.json", train.describe_run(dataset))
    saved = Checkpoints(path / "checkpoints")
    saved.save(make_state(variables, optimizer, np.zeros((1, 1, 1), np.float32)), {}, "last")
    saved.close()

    embedder = inference.load_model(path)
    features = evaluate.extract_features(
        embedder.embed,
        recipe.load_images(config, dataset.query, progress=False),
        recipe.load_images(config, dataset.gallery, progress=False),
    )
    descriptors.save_features(path / "features.npz", features)
    options = {"dataset": dataset.name, "setting": config.model.setting, "seed": config.seed}
    results = evaluate.evaluate_features(
        features,
        reranks=rerank.parse(config.eval.rerank, config.eval.rerank_options.to_dict()),
        **options,
    )
    write_json(path / "results.json", results)
    records = [
        {
            "kind": "train",
            "step": step,
            "epoch": (step - 1) // 10,
            "loss": 5 / step,
            "cross_entropy": 3 / step,
            "triplet": 0.0 if step == 7 else 1 / step,
            "center": 100 / step,
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        for step in range(1, 31)
    ]
    scores = {"mAP": 0.2, "mINP": 0.1, "rank1": 0.2, "rank5": 0.5, "rank10": 0.8}
    records.append({"kind": "eval", "step": 30, "epoch": 2, **scores})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines)
    timing = {"step": 30, "seconds": 2.0, "images_per_second": 120.0}
    (path / "timing.jsonl").write_text(json.dumps(timing) + "\n")
    return path

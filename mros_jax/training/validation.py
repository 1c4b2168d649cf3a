"""Evaluation of a model while and after it is trained."""

import functools
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import parallel
from mros_jax.data.datasets.splits import Dataset
from mros_jax.evaluate import evaluate_features, extract_features
from mros_jax.files import write_json
from mros_jax.inference import Embedder, make_checkpoint_id
from mros_jax.models.outputs import Network
from mros_jax.retrieval import descriptors, rerank
from mros_jax.training.state import TrainState

RANKS = (1, 5, 10)


class Evaluator:
    """Scores the states of a run on its data set's queries and gallery.

    Images are decoded and programs compiled once. In a run of many processes each computes the
    same, on its own devices.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, network: Network):
        self._config, self._dataset = config, dataset
        self._embedder = Embedder(network, {}, height=config.input.height, width=config.input.width)
        progress = parallel.is_main_process()
        self._query = configs.load_images(config, dataset.query, progress=progress)
        self._gallery = configs.load_images(config, dataset.gallery, progress=progress)

    def run(
        self, state: TrainState, epoch: int, workdir: pathlib.Path | None = None
    ) -> dict[str, float]:
        """Evaluates a state; with a workdir also with re-ranking, and all results are kept there.

        Args:
            state: to evaluate.
            epoch: completed epochs.
            workdir: where `features.npz` and `results.json` are written, by process 0.

        Returns:
            mAP, mINP and rank1, rank5, rank10 without re-ranking, as fractions of 1.
        """
        config = self._config.eval
        self._embedder.replace_variables(jax.device_get(state.eval_variables))
        features = extract_features(
            functools.partial(
                self._embedder.embed,
                batch_size=config.batch_size,
                flip_test=config.flip_test,
                progress=parallel.is_main_process(),
            ),
            self._query,
            self._gallery,
        )
        results = evaluate_features(
            features,
            dataset=self._dataset.name,
            reranks=rerank.parse(config.rerank, config.rerank_options.to_dict()) if workdir else (),
            metric=config.metric,
            ap=config.ap,
            flip_test=config.flip_test,
            keep_junk=config.keep_junk,
            system=self._config.name,
            seed=self._config.seed,
            step=int(state.step),
            epoch=epoch,
        )
        if workdir and parallel.is_main_process():
            identity = make_checkpoint_id("last", int(state.step), self._embedder.variables)
            features["checkpoint_id"] = np.asarray(identity)
            descriptors.save_features(workdir / "features.npz", features)
            write_json(workdir / "results.json", results)
        plain = results["results"][0]
        ranks = {f"rank{k}": plain["cmc"][min(k, len(plain["cmc"])) - 1] for k in RANKS}
        return {"mAP": plain["mAP"], "mINP": plain["mINP"], **ranks}

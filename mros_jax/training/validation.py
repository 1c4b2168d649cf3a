"""Evaluation of a model while and after it is trained."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import parallel
from mros_jax.data.splits import Dataset
from mros_jax.files import write_json
from mros_jax.inference import make_checkpoint_id, make_embedder
from mros_jax.models.outputs import Network
from mros_jax.retrieval import Placement, descriptors, labels, rerank
from mros_jax.runs.features import extract_features
from mros_jax.runs.results import evaluate_features, get_scores
from mros_jax.runs.run import Run
from mros_jax.training.state import TrainState


class Evaluator:
    """Scores the states of a run on its data set's queries and gallery.

    Images are decoded and programs compiled once. In a run of many processes each computes a share
    of the descriptors and of the rankings on its own devices; all have the whole at the end.

    Raises:
        UserError: images that cannot be read, or queries none of which has a match.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, network: Network):
        self._config, self._dataset = config, dataset
        self._embedder = make_embedder(config, network, {})
        progress = parallel.is_main_process()
        self._query = configs.load_images(config, dataset.query, progress=progress)
        self._gallery = configs.load_images(config, dataset.gallery, progress=progress)
        query, gallery = self._query.split, self._gallery.split
        labels.check_labels(
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
            len(query),
            len(gallery),
            junk_pid=-1,
            distractor_pid=0,
        )

    def score(self, state: TrainState, epoch: int) -> dict[str, float]:
        """Evaluate a state without re-ranking.

        Args:
            state: to evaluate.
            epoch: completed epochs.

        Returns:
            mAP, mINP and rank1, rank5, rank10 as fractions of 1.
        """
        results, _ = self._evaluate(state, epoch, reranks=(), exits=False)
        return get_scores(results["results"][0])

    def finish(self, state: TrainState, epoch: int, run: Run) -> dict[str, float]:
        """Evaluate the last state, also with re-ranking and at each of the network's exits.

        Process 0 keeps all descriptors and results in the run.

        Args:
            state: to evaluate.
            epoch: completed epochs.
            run: where `features.npz` and `results.json` are written.

        Returns:
            As `score`.
        """
        results, features = self._evaluate(state, epoch, reranks=configs.make_reranks(self._config))

        def write() -> None:
            fingerprints = {s: str(features[f"{s}_fingerprint"]) for s in ("query", "gallery")}
            path = run.features_file(
                self._dataset.name,
                fingerprints,
                flip_test=self._config.eval.flip_test,
                crops=self._config.eval.crops,
            )
            descriptors.save_features(path, features)
            write_json(run.results_file, results)

        parallel.run_on_main(write)
        return get_scores(results["results"][0])

    def _evaluate(
        self,
        state: TrainState,
        epoch: int,
        reranks: Sequence[rerank.Rerank],
        exits: bool = True,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        config = self._config.eval
        variables = jax.device_get(state.eval_variables)
        self._embedder.replace_variables(variables)
        features = extract_features(
            functools.partial(
                self._embedder.embed_all,
                batch_size=config.batch_size,
                flip_test=config.flip_test,
                crops=config.crops,
                progress=parallel.is_main_process(),
                together=True,
            ),
            self._query,
            self._gallery,
            checkpoint_id=make_checkpoint_id("last", int(state.step), variables),
            flip_test=config.flip_test,
            crops=config.crops,
            count_multiply_adds=self._embedder.count_multiply_adds,
            heads=self._embedder.fold_heads(),
        )
        results = evaluate_features(
            features,
            dataset=self._dataset.name,
            reranks=reranks,
            metric=config.metric,
            normalize=config.normalize,
            ap=config.ap,
            flip_test=config.flip_test,
            crops=config.crops,
            exits=exits,
            keep_junk=config.keep_junk,
            system=self._config.name,
            seed=self._config.seed,
            step=int(state.step),
            epoch=epoch,
            placement=Placement(together=True),
        )
        return results, features

"""Evaluation of a model while and after it is trained."""

import logging
import pathlib

import jax
from ml_collections import ConfigDict

from mros_jax import parallel
from mros_jax.data import store
from mros_jax.data.splits import Dataset
from mros_jax.inference import Embedder
from mros_jax.models.mros import MROS
from mros_jax.retrieval import evaluate
from mros_jax.state import TrainState
from mros_jax.writer import write_json

log = logging.getLogger(__name__)


class Evaluator:
    def __init__(self, config: ConfigDict, dataset: Dataset, model: MROS):
        self._config, self._dataset = config, dataset
        self._embedder = Embedder(model, {}, height=config.input.height, width=config.input.width)
        self._stores = [
            store.load_store(
                s,
                height=config.input.height,
                width=config.input.width,
                cache_dir=config.dataset.cache_dir,
                on_bad_image=config.dataset.on_bad_image,
            )
            for s in (dataset.query, dataset.gallery)
        ]

    def run(self, state: TrainState, workdir: pathlib.Path | None) -> dict[str, float]:
        self._embedder.variables = jax.device_get(state.eval_variables)
        q, g = (
            self._embedder.embed(
                s.images,
                batch_size=self._config.eval.batch_size,
                progress=parallel.is_main_process(),
            )
            for s in self._stores
        )
        Q, G = (s.split for s in self._stores)
        out = []
        for rerank in (None, *(self._config.eval.rerank if workdir else ())):
            r = evaluate(
                q,
                g,
                Q.pids,
                G.pids,
                Q.camids,
                G.camids,
                rerank=rerank,
                metric=self._config.eval.metric,
                ap=self._config.eval.ap,
            )
            log.info("%s: %s", rerank or "plain", r)
            out.append({"name": rerank or "plain", **r.to_dict()})
        if workdir:
            write_json(workdir / "results.json", {"results": out})
        r = out[0]
        return {
            "mAP": r["mAP"],
            "mINP": r["mINP"],
            **{f"rank{k}": float(r["cmc"][k - 1]) for k in (1, 5, 10)},
        }

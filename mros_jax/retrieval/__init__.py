"""What a result is: distances, CMC and mAP, re-ranking. Usable alone on any features."""

from mros_jax.retrieval import rerank
from mros_jax.retrieval.distances import compute_distances
from mros_jax.retrieval.metrics import Result, evaluate, evaluate_distances

__all__ = ["Result", "compute_distances", "evaluate", "evaluate_distances", "rerank"]

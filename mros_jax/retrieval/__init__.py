"""What a result is: distances, CMC and mAP, re-ranking. Usable alone on any features."""

from mros_jax.retrieval import bootstrap, files, rerank
from mros_jax.retrieval.distances import compute_distances
from mros_jax.retrieval.metrics import Result, evaluate, evaluate_distances
from mros_jax.retrieval.verification import Verification, verify, verify_distances

__all__ = [
    "Result",
    "Verification",
    "bootstrap",
    "compute_distances",
    "evaluate",
    "evaluate_distances",
    "files",
    "rerank",
    "verify",
    "verify_distances",
]

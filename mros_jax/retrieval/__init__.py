"""What a result is: distances, CMC and mAP, re-ranking. Usable alone on any features."""

from mros_jax.retrieval import bootstrap, descriptors, jitted, rerank
from mros_jax.retrieval.blocks import Placement
from mros_jax.retrieval.distances import compute_distances
from mros_jax.retrieval.labels import Side
from mros_jax.retrieval.metrics import Result, evaluate, evaluate_distances
from mros_jax.retrieval.rerank import AQE, ECN, GSRW, KReciprocal
from mros_jax.retrieval.verification import Verification, verify, verify_distances

__all__ = [
    "AQE",
    "ECN",
    "GSRW",
    "KReciprocal",
    "Placement",
    "Result",
    "Side",
    "Verification",
    "bootstrap",
    "compute_distances",
    "descriptors",
    "evaluate",
    "evaluate_distances",
    "jitted",
    "rerank",
    "verify",
    "verify_distances",
]

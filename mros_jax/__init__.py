"""Person re-identification in JAX: MROS, its training, exact evaluation and re-ranking."""

__version__ = "0.2.0"

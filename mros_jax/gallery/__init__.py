"""A gallery on disk that grows and is searched: descriptors with their names, in an index."""

from mros_jax.gallery.features import Features, Listed, describe, list_images
from mros_jax.gallery.index import Found, Index

__all__ = ["Features", "Found", "Index", "Listed", "describe", "list_images"]

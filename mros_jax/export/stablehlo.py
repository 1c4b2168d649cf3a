"""StableHLO files: a zip of a program for every platform and of what is known of it."""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from mros_jax.export.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM = "model.stablehlo"  # as `jax.export.deserialize` reads it
METADATA = "metadata.json"


def convert(model: Model) -> bytes:
    """The program: uint8 (batch, height, width, 3) of any size to descriptors (batch, D)."""
    # A program has several outputs or one; that of files has one, an array.
    shape = jax.export.symbolic_shape("batch, height, width, 3")
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    exported = jax.export.export(jax.jit(model.__call__), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def pack(program: bytes, metadata: Mapping[str, Any]) -> bytes:
    """The file's content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(PROGRAM, program)
        archive.writestr(METADATA, json.dumps(metadata, indent=2) + "\n")
    return file.getvalue()


class Session:
    """A program as JAX runs it where this process runs."""

    def __init__(self, program: bytes):
        self._call = jax.jit(jax.export.deserialize(bytearray(program)).call)

    def __call__(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B D"]:
        """Descriptors of images of one size."""
        return np.asarray(self._call(images))

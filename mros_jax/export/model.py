"""What is exported: a run's network as it is tested, and what is known of it."""

import dataclasses
import functools
import json
import logging
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from mros_jax import __version__
from mros_jax.config import DTYPES, find_normalization, find_size
from mros_jax.data import augment
from mros_jax.data.datasets import records
from mros_jax.inference import Embedder, choose_test, load_model, make_embedder
from mros_jax.models.outputs import Outputs, Part
from mros_jax.runs.results import RANKS
from mros_jax.runs.run import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A run's network with its variables, the images that it takes and the test that it is put to.

    Attributes:
        run: the run.
        embedder: computes the run's own descriptors, in float32.
        checkpoint: "last" or "best".
        flip_test: descriptors are means over image and mirror image.
        crops: "ten": they are means over ten crops; or "none".
    """

    run: Run
    embedder: Embedder
    checkpoint: str
    flip_test: bool
    crops: str

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The run's."""
        return ConfigDict(self.run.config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that images are resized to."""
        return find_size(self.config, self.config.eval)

    @property
    def interpolation(self) -> str:
        """Of that resize, "bilinear" or "bicubic"."""
        return str(self.config.input.interpolation)

    @property
    def normalization(self) -> dict[str, Any]:
        """Of pixels: `mean`, `std` and `channels` of `mros_jax.data.augment.preprocess`."""
        defaults = {"mean": augment.IMAGENET_MEAN, "std": augment.IMAGENET_STD, "channels": "rgb"}
        return defaults | find_normalization(self.config)

    @property
    def normalized(self) -> bool:
        """Whether descriptors are divided by their norm, as the run's protocol compares them."""
        return bool(self.config.eval.normalize)

    def embed(self, images: list[np.ndarray]) -> np.ndarray:
        """The run's own descriptors (N, D) of uint8 images (H, W, 3) of any sizes."""
        made = self.embedder.embed(
            images, batch_size=32, flip_test=self.flip_test, crops=self.crops
        )
        return made / np.linalg.norm(made, axis=1, keepdims=True) if self.normalized else made

    def describe(self, inputs: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Descriptors of what is resized and normalized, not divided by their norm.

        The number of images may be symbolic; the size is that of `size`.
        """
        if self.crops == "ten":
            crop = self.config.input
            views = augment.ten_crops(inputs, height=crop.height, width=crop.width)
        elif self.flip_test:
            views = jnp.stack([inputs, inputs[:, :, ::-1]])
        else:
            return self._apply(inputs)
        made = self._apply(views.reshape(-1, *views.shape[2:]))
        return jnp.mean(made.reshape(len(views), inputs.shape[0], -1), axis=0)

    def _apply(self, inputs: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        outputs: Outputs = self.embedder.network.apply(self.embedder.variables, inputs, train=False)
        descriptor: Array = outputs.descriptor
        return descriptor

    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """All that a file does; number and sizes of the images may be symbolic."""
        height, width = self.size
        descriptor = self.describe(
            augment.preprocess_any(
                images,
                height=height,
                width=width,
                interpolation=self.interpolation,
                **self.normalization,
            )
        )
        if not self.normalized:
            return descriptor
        norms: Array = jnp.linalg.norm(descriptor, axis=1, keepdims=True)
        return descriptor / norms

    def explain(self) -> dict[str, Any]:
        """What a file says of itself, as JSON: see docs/export.md."""
        height, width = self.config.input.height, self.config.input.width
        parts: tuple[Part, ...] = self.embedder.network.parts(height, width)
        return {
            "system": self.run.system,
            "library": f"mros_jax {__version__}",
            "checkpoint": self.embedder.checkpoint_id,
            "trained_on": self.run.dataset,
            "licence": self._licences(),
            "input": {
                "images": "uint8 RGB (batch, height, width, 3), of any size",
                "resized_to": list(self.size),
                "interpolation": self.interpolation,
                "mean": list(self.normalization["mean"]),
                "std": list(self.normalization["std"]),
                "channels": self.normalization["channels"],
                "flip_test": self.flip_test,
                "crops": self.crops,
            },
            "descriptor": {
                "size": self.embedder.descriptor_sizes["descriptor"],
                "normalized": self.normalized,
                "metric": self.config.eval.metric,
                "parts": [dataclasses.asdict(part) for part in parts],
            },
            "scores": self._scores(),
        }

    def _licences(self) -> dict[str, str]:
        """Of the code, and of what the weights were trained on and began from."""
        record = records.DATASETS.get(self.run.dataset)
        terms = record.terms if record is not None else ""
        start = self.config.get("weights", "none")
        return {
            "code": "Apache-2.0",
            "training images": f"{self.run.dataset}: {terms or 'as those who made it have it'}",
            "initial weights": "none: a random start"
            if start == "none"
            else f"{start}: torchvision's (BSD-3-Clause), trained on ImageNet (for research)",
        }

    def _scores(self) -> list[dict[str, Any]]:
        """The run's scores with their protocols, where they are of these descriptors."""
        if not self.run.results_file.is_file() or self.checkpoint != "last":
            return []
        protocol = self.run.rankings[0]["protocol"]
        tested = bool(protocol.get("flip_test")), protocol.get("crops") or "none"
        if tested != (self.flip_test, self.crops):
            return []
        return [
            {
                "rerank": ranking["rerank"],
                "mAP": ranking["mAP"],
                "mINP": ranking["mINP"],
                **{f"rank{k}": ranking["cmc"][k - 1] for k in RANKS if k <= len(ranking["cmc"])},
                "protocol": ranking["protocol"],
            }
            for ranking in self.run.rankings
        ]


def load(
    run: str | os.PathLike[str],
    checkpoint: str = "last",
    *,
    flip_test: bool | None = None,
    crops: str | None = None,
) -> Model:
    """The model of a run.

    A network that was trained in bfloat16 computes in float32 here, and so do files.

    Args:
        run: the run's directory.
        checkpoint: "last" or "best".
        flip_test: mean over image and mirror image; None: as the run.
        crops: "ten", "none"; None: as the run.

    Raises:
        NotFoundError: as `mros_jax.inference.load_model`.
        UserError: as there; or a flip test of ten crops.
    """
    embedder = load_model(run, checkpoint)
    config = embedder.config
    assert config is not None
    if DTYPES[config.dtype] != jnp.float32:
        log.info("The run computes in %s; what is exported computes in float32", config.dtype)
        network: Any = embedder.network
        embedder = make_embedder(
            config,
            network.clone(dtype=jnp.float32),
            embedder.variables,
            checkpoint_id=embedder.checkpoint_id,
        )
    flip_test, crops = choose_test(config.eval, flip_test, crops)
    return Model(Run.open(run), embedder, checkpoint, flip_test, crops)


def flatten(explained: dict[str, Any]) -> dict[str, str]:
    """The same for formats that know strings only: what is no string becomes JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in explained.items()
    }

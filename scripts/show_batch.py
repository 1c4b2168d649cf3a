"""Writes a contact sheet of one training batch: every image as stored, and augmented beside it.

python scripts/show_batch.py --dataset market1501 --root PATH --out batch.png
python scripts/show_batch.py --dataset synthetic --preset demo --out batch.png

A row is an identity. The same seed and step show the pictures that training sees.
"""

import functools
import os
import pathlib

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from mros_jax.data import augment, batches, store
from mros_jax.data.datasets import records, sources

_DATASET = flags.DEFINE_enum("dataset", "synthetic", sorted(records.DATASETS), "Data set.")
_ROOT = flags.DEFINE_string("root", None, "Directory with the data.")
_PRESET = flags.DEFINE_string("preset", "demo", "Size of the synthetic data set.")
_OUT = flags.DEFINE_string("out", "batch.png", "PNG to write.")
_IDENTITIES = flags.DEFINE_integer("identities", 4, "P: identities, one row each.", 1)
_IMAGES = flags.DEFINE_integer("images", 4, "K: images of each.", 1)
_HEIGHT = flags.DEFINE_integer("height", 384, "Input height in pixels.", 1)
_WIDTH = flags.DEFINE_integer("width", 128, "Input width in pixels.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the run.", 0)
_STEP = flags.DEFINE_integer("step", 0, "Training step, from 0.", 0)
_FILL = flags.DEFINE_enum("erase_fill", "mean", ["mean", "public"], "What erasing writes.")
_GAP = 4


def to_levels(images: np.ndarray) -> np.ndarray:
    """Undoes the normalisation."""
    levels = images * np.array(augment.IMAGENET_STD) + np.array(augment.IMAGENET_MEAN)
    return np.clip(np.rint(255 * levels), 0, 255).astype(np.uint8)


def make_sheet(pairs: np.ndarray) -> np.ndarray:
    """Lays (P, 2 K, H, W, 3) images out as P rows, white between them."""
    padded = np.pad(
        pairs, ((0, 0), (0, 0), (_GAP, 0), (_GAP, 0), (0, 0)), constant_values=255
    )  # (P, 2 K, H + gap, W + gap, 3)
    rows, columns, height, width, _ = padded.shape
    return padded.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def main(_: list[str]) -> None:
    is_synthetic = _DATASET.value == "synthetic"
    options = {"preset": _PRESET.value} if is_synthetic else {}
    dataset = sources.load_dataset(_DATASET.value, _ROOT.value, **options)
    height, width = _HEIGHT.value, _WIDTH.value
    images = store.load_store(dataset.train, height=height, width=width)
    batch = _IDENTITIES.value * _IMAGES.value
    epoch, step = divmod(_STEP.value, batches.steps_per_epoch(len(images), batch))
    assert images.labels is not None
    plan = batches.plan_epoch(
        images.labels,
        identities=_IDENTITIES.value,
        images=_IMAGES.value,
        seed=_SEED.value,
        epoch=epoch,
    )
    stored = images.images[plan[step]]
    keys = augment.example_keys(_SEED.value, _STEP.value, np.arange(batch))
    run = functools.partial(
        augment.augment_batch, height=height, width=width, erase_fill=_FILL.value
    )
    augmented = jax.jit(run)(stored, keys)
    plain = np.asarray(augment.resize(stored, height=height, width=width)).astype(np.uint8)
    pairs = np.stack([plain, to_levels(np.asarray(augmented))], 1)  # (P K, 2, H, W, 3)
    pairs = pairs.reshape(_IDENTITIES.value, 2 * _IMAGES.value, *pairs.shape[2:])
    out = pathlib.Path(_OUT.value)
    temporary = out.with_name(f".{out.name}.tmp")
    Image.fromarray(make_sheet(pairs)).save(temporary, "png")
    os.replace(temporary, out)
    print(f"{out}: step {_STEP.value} (epoch {epoch}), stored and augmented side by side")


if __name__ == "__main__":
    app.run(main)

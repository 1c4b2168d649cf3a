"""The whole way on ten real JPEG files: read, check, decode, plan, augment."""

import pathlib

import jax
import numpy as np
from PIL import Image

from mros_jax.data import examination
from mros_jax.data.augment import augment_batch, example_keys, preprocess
from mros_jax.data.batches import plan_epoch
from mros_jax.data.datasets.sources import load_dataset
from mros_jax.data.store import labels_of, load_store

ROOT = pathlib.Path(__file__).parents[1] / "data" / "pedestrians"


def test_from_files_to_batches(tmp_path):
    data = load_dataset("folder", ROOT)
    assert [len(split) for split in data.splits] == [4, 2, 4]
    np.testing.assert_array_equal(data.pid_of_label, [1, 4])
    np.testing.assert_array_equal(sorted(data.gallery.pids), [-1, 0, 5, 6])
    report = examination.examine(data, identities=2, images=2, progress=False)
    assert report.findings == ()

    store = load_store(data.train, height=384, width=128, cache_dir=tmp_path, progress=False)
    assert store.images.shape == (4, 128, 64, 3)
    plan = plan_epoch(labels_of(store), identities=2, images=2, seed=0, epoch=0)
    np.testing.assert_array_equal(np.sort(plan), [[0, 1, 2, 3]])

    batch = store.images[plan[0]]
    ours = jax.jit(lambda x: preprocess(x, height=96, width=32))(batch)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for image, normalised in zip(batch, ours, strict=True):
        pil = Image.fromarray(image).resize((32, 96), Image.Resampling.BILINEAR)
        levels = (np.asarray(normalised) * std + mean) * 255
        assert np.abs(levels - np.asarray(pil)).max() < 1.01

    keys = example_keys(0, 0, np.arange(4))
    still = jax.jit(lambda x, k: augment_batch(x, k, height=96, width=32, flip=0, pad=0, erase=0))(
        batch, keys
    )
    np.testing.assert_array_equal(still, ours)

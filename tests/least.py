"""The least network that training can run, for tests of what is around a network."""

import flax.linen as nn

from mros_jax.models.outputs import Outputs, Part
from mros_jax.systems import NETWORKS
from tests.training import ROOT, TINY


class Mean(nn.Module):
    """The mean color, and a classifier of it."""

    num_classes: int
    dtype: type
    bn_axis_name: str | None

    @nn.compact
    def __call__(self, images, *, train, keys=None):
        x = images.mean(axis=(1, 2))
        logits = {"all": nn.Dense(self.num_classes)(x)[:, None]}
        return Outputs(descriptor=x, embeddings={}, logits=logits, maps={})

    def parts(self, height, width):
        return (Part("all", 3),)

    def torchvision_name(self, path):
        return None


_CONFIG = """
from ml_collections import ConfigDict
from mros_jax.config import read

def get_config(arg):
    config = read({demo!r}, arg).unlock()
    config.name = "mean"
    config.network = ConfigDict({{"name": "mean"}})
    config.objective = ConfigDict({{"all": {{"loss": "cross_entropy", "on": ("all",)}}}})
    config.optimizer = ConfigDict({{"all": {{"params": ("",)}}}})
    return config
"""


def write_config(directory, cache_dir, monkeypatch):
    """Write a config of the network `Mean` on the tiny data set; the words that name it."""
    monkeypatch.setitem(NETWORKS, "mean", Mean)
    path = directory / "mean.py"
    path.write_text(_CONFIG.format(demo=str(ROOT / "configs" / "demo.py")))
    values = {**TINY, "dataset.cache_dir": cache_dir}
    return [f"--config={path}", *(f"--config.{name}={value}" for name, value in values.items())]

"""A laptop-sized MROS on the embedded synthetic data set.

    python -m mros_jax.train --config configs/demo.py --workdir runs/demo

The arithmetic and the code path are those of `configs/mros.py`; only sizes differ: a tiny ResNet,
96x48 pixels, 64 identities. An argument picks the setting: `--config configs/demo.py:III`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# The neighbouring file, wherever the command is run from.
_MROS = runpy.run_path(str(pathlib.Path(__file__).with_name("mros.py")))


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe at laptop size; `arg` is a setting of the paper's Table 1."""
    config = _MROS["get_config"](f"{arg or 'IV'},synthetic")
    config.num_epochs = 32
    config.dataset.preset = "demo"
    config.batch.identities = 16
    config.input.height = 96
    config.input.width = 48
    config.augment.pad = 4
    config.model.backbone = "tiny"
    config.model.weights = "none"
    config.optimizer.lr = 6e-3  # a small network from random weights wants more than the paper's
    config.optimizer.warmup_epochs = 4
    config.optimizer.decay_epochs = (20, 28)
    config.eval.every_epochs = 8
    return config

"""A laptop-sized MROS on the embedded synthetic data set.

    python -m mros_jax.train --config configs/demo.py --workdir runs/demo

The arithmetic and the code path are those of `configs/mros.py`; only sizes differ: a tiny ResNet,
96x48 pixels, 64 identities. An argument picks the setting: `--config configs/demo.py:III`.
"""

import pathlib

from ml_collections import ConfigDict

from mros_jax.config import read, read_variants, shrink

# The neighbouring file, wherever the command is run from.
_MROS = pathlib.Path(__file__).with_name("mros.py")
VARIANTS = read_variants(_MROS)


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe at laptop size; `arg` is a setting of the paper's Table 1."""
    config = shrink(read(_MROS, arg).unlock())
    # A small network from random weights wants more than the paper's 1e-3.
    config.optimizer.network.lr = 6e-3
    return config

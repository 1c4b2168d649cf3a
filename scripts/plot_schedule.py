"""Plots a config's learning rate: `python scripts/plot_schedule.py --config configs/mros.py`."""

import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags
from matplotlib.figure import Figure
from ml_collections import config_flags

from mros_jax.training import recipe

_CONFIG = config_flags.DEFINE_config_file("config", "configs/mros.py", "Config.", lock_config=True)
_STEPS = flags.DEFINE_integer("steps_per_epoch", 101, "12,936 // 128 on Market-1501.", 1)
_OUT = flags.DEFINE_string("out", "schedule.png", "Picture to write.")


def main(argv: list[str]) -> None:
    """Command line."""
    del argv
    schedule = recipe.make_config_schedule(_CONFIG.value, _STEPS.value)
    steps = jnp.arange(_CONFIG.value.num_epochs * _STEPS.value)
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps / _STEPS.value, jax.vmap(schedule)(steps))
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(_OUT.value, dpi=150)
    print(pathlib.Path(_OUT.value).absolute())


if __name__ == "__main__":
    app.run(main)

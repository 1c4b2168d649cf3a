"""Plot a config's learning rates, a line for each group of parameters.

python -m scripts.plot_schedule --config configs/mros.py
"""

import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mros_jax import console
from mros_jax.files import write_atomically
from mros_jax.training import recipe
from scripts import common


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument(
        "--steps_per_epoch", type=console.count, default=101, help="101: 12,936 // 128, Market-1501"
    )
    parser.add_argument("--out", type=pathlib.Path, default="schedule.png", help="PNG to write")
    config, args = common.parse_with_config(parser, argv)
    steps = jnp.arange(config.num_steps or config.num_epochs * args.steps_per_epoch)
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for name, schedule in recipe.make_schedules(config, args.steps_per_epoch).items():
        rates = np.array(jax.vmap(schedule)(steps))
        rates[rates == 0] = np.nan  # frozen in a stage
        axes.plot(steps / args.steps_per_epoch, rates, label=name)
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with write_atomically(args.out, "wb") as file:
        figure.savefig(file, format="png", dpi=150)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

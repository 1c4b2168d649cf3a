"""Draw a training batch: every image as stored, and beside it as training sees it.

python -m scripts.show_batch --config configs/mros.py --config.dataset.root=PATH --out batch.png
python -m scripts.show_batch --config configs/demo.py --step 7 --rows 4

Batch and pictures are those of the config's run at that step. A row holds the images of an
identity where the sampler draws identities.
"""

import math
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from mros_jax import config as configs
from mros_jax import console
from mros_jax.data import augment, batches
from mros_jax.data.store import labels_of
from mros_jax.files import write_atomically
from mros_jax.training import recipe
from scripts import common

_GAP = 4  # pixels


def to_levels(
    images: np.ndarray,
    *,
    mean: Sequence[float] = augment.IMAGENET_MEAN,
    std: Sequence[float] = augment.IMAGENET_STD,
    channels: str = "rgb",
) -> np.ndarray:
    """Undo the normalization."""
    levels = images * np.array(std) + np.array(mean)
    levels = levels if channels == "rgb" else levels[..., ::-1]
    clipped: np.ndarray = np.clip(np.rint(255 * levels), 0, 255)
    return clipped.astype(np.uint8)


def make_sheet(images: np.ndarray) -> np.ndarray:
    """Lay (rows, columns, H, W, 3) images out, white between them."""
    gaps = ((0, 0), (0, 0), (_GAP, 0), (_GAP, 0), (0, 0))
    padded = np.pad(images, gaps, constant_values=255)
    rows, columns, height, width, _ = padded.shape
    return padded.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--step", type=int, default=0, help="of the run, from 0")
    parser.add_argument("--rows", type=console.count, default=8, help="rows to show at most")
    parser.add_argument("--out", type=pathlib.Path, default="batch.png", help="PNG to write")
    config, args = common.parse_with_config(parser, argv)
    if args.step < 0:
        parser.error(f"--step is {args.step}; steps are counted from 0")
    recipe.check_config(config)
    images = configs.load_images(config, configs.load_dataset(config).train)
    sampler = batches.make_sampler(config.batch.to_dict())
    labels = labels_of(images)
    epoch, step = divmod(args.step, sampler.steps(labels))
    plan = sampler.plan(labels, images.split.camids, seed=config.seed, epoch=epoch)
    stored = images.images[plan[step]]
    keys = augment.example_keys(config.seed, args.step, np.arange(sampler.size))
    augmented = jax.jit(recipe.make_augment(config))(stored, keys)
    size = {name: config.input[name] for name in ("height", "width", "interpolation")}
    plain = augment.resize(stored, **size)
    shown = to_levels(np.asarray(augmented), **configs.find_normalization(config))
    pairs = np.stack([np.asarray(plain).astype(np.uint8), shown], 1)

    square = math.isqrt(sampler.size)
    columns = sampler.images if isinstance(sampler, batches.Identities) else square
    rows = min(args.rows, sampler.size // columns)
    pairs = pairs[: rows * columns].reshape(rows, 2 * columns, *pairs.shape[2:])
    with write_atomically(args.out, "wb") as file:
        Image.fromarray(make_sheet(pairs)).save(file, "png")
    print(f"{args.out}: step {args.step} (epoch {epoch}), stored and augmented side by side")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

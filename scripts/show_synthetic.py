"""Draw people of the synthetic data set: an identity a row, look-alikes together.

python -m scripts.show_synthetic --out sheet.png
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mros_jax import console
from mros_jax.data.synthetic import dataset as synthetic
from mros_jax.files import write_atomically
from scripts import common

_LOOKALIKES = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path, default="synthetic.png", help="PNG or JPEG")
    parser.add_argument("--groups", type=console.count, default=4, help="groups of look-alikes")
    parser.add_argument(
        "--members",
        type=int,
        choices=range(1, _LOOKALIKES + 1),
        default=2,
        help="identities of each group",
    )
    parser.add_argument(
        "--columns", type=console.count, default=2, help="pictures of an identity in each camera"
    )
    parser.add_argument("--scale", type=console.count, default=1, help="enlargement")
    parser.add_argument("--seed", type=int, default=0, help="of the data set")
    args = parser.parse_args(argv)
    kind = Image.registered_extensions().get(args.out.suffix.lower())
    if kind not in ("PNG", "JPEG"):
        parser.error(f"--out {args.out} must end in .png or .jpg")
    dataset = synthetic.make_dataset(
        num_train_pids=args.groups * _LOOKALIKES,
        num_test_pids=1,
        images_per_pid_and_camera=args.columns,
        lookalikes=_LOOKALIKES,
        seed=args.seed,
    )
    keep = (dataset.train.pids - 1) % _LOOKALIKES < args.members
    pictures = dataset.train.images.select(np.flatnonzero(keep)).map(lambda picture: picture)
    images = np.stack([picture.require() for picture in pictures])
    _, height, width, _ = images.shape
    rows = args.groups * args.members
    grid = images.reshape(rows, -1, height, width, 3).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(grid.reshape(rows * height, -1, 3))
    size = (sheet.width * args.scale, sheet.height * args.scale)
    with write_atomically(args.out, "wb") as file:
        sheet.resize(size, Image.Resampling.LANCZOS).save(file, kind)
    print(f"{args.out}: {size[0]} x {size[1]} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

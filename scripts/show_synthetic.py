"""Contact sheet of the synthetic data set: an identity a row, look-alikes together.

python scripts/show_synthetic.py --out sheet.png
"""

import numpy as np
from absl import app, flags
from PIL import Image

from mros_jax.data.synthetic import dataset as synthetic

_OUT = flags.DEFINE_string("out", "synthetic.png", "PNG or JPEG to write.")
_GROUPS = flags.DEFINE_integer("groups", 4, "Groups of look-alikes to show.")
_MEMBERS = flags.DEFINE_integer("members", 2, "Identities of each group to show, 1 to 8.")
_COLUMNS = flags.DEFINE_integer("columns", 2, "Pictures of each identity in each camera.")
_SCALE = flags.DEFINE_integer("scale", 1, "Enlargement.")
_SEED = flags.DEFINE_integer("seed", 0, "The data set's seed.")


def main(_: list[str]) -> None:
    dataset = synthetic.make_dataset(
        num_train_pids=_GROUPS.value * 8,
        num_test_pids=1,
        images_per_pid_and_camera=_COLUMNS.value,
        lookalikes=8,
        seed=_SEED.value,
    )
    keep = (dataset.train.pids - 1) % 8 < _MEMBERS.value
    pictures = dataset.train.images.select(np.flatnonzero(keep)).map(lambda picture: picture)
    images = np.stack([picture.require() for picture in pictures])
    _, height, width, _ = images.shape
    rows = _GROUPS.value * _MEMBERS.value
    grid = images.reshape(rows, -1, height, width, 3).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(grid.reshape(rows * height, -1, 3))
    size = (sheet.width * _SCALE.value, sheet.height * _SCALE.value)
    sheet.resize(size, Image.Resampling.LANCZOS).save(_OUT.value)
    print(f"wrote {_OUT.value}, {size[0]} x {size[1]} pixels")


if __name__ == "__main__":
    app.run(main)

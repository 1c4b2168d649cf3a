"""Times the appearance features of a frame's boxes, as a tracker asks for them.

    python -m scripts.bench_tracking --config configs/mros.py
    python -m scripts.bench_tracking --config configs/demo.py --boxes 1,8,32

A frame of 1,920 x 1,080 pixels of noise, boxes of 40 to 160 pixels across and 2.5 times as high;
the config's network with random weights. Each number of boxes is called once before it is timed;
the median of the repeats counts. Beside it, the time of cutting and resizing alone.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from mros_jax import console, parallel
from mros_jax.config import find_size
from mros_jax.data import decoding
from mros_jax.inference import make_embedder
from mros_jax.tracking import Appearance, cut
from mros_jax.training import recipe
from scripts import common

HEIGHT, WIDTH = 1080, 1920


def make_boxes(num: int) -> np.ndarray:
    """(num, 4) edges of people within the frame."""
    rng = np.random.default_rng(num)
    width = rng.uniform(40, 160, num)
    size = np.stack([width, 2.5 * width], axis=1)
    first = rng.uniform(0, np.array([WIDTH, HEIGHT]) - size)
    return np.concatenate([first, first + size], axis=1)


def clock(work: Callable[[], object], repeats: int) -> float:
    """Median of the seconds that a call takes, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        since = time.perf_counter()
        work()
        times.append(time.perf_counter() - since)
    return statistics.median(times)


def read_numbers(text: str) -> list[int]:
    return [console.count(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    common.add_repeats(parser, 10)
    parser.add_argument("--boxes", type=read_numbers, default="1,4,16,64", help="in a frame")
    common.add_markdown(parser)
    config, args = common.parse_with_config(parser, argv)
    config.weights = "none"
    parallel.use_compilation_cache()
    parts = recipe.build(config, num_classes=10, steps_per_epoch=10)
    model = make_embedder(config, parts.network, parts.state.eval_variables)
    appearance = Appearance(model, flip_test=False)
    height, width = find_size(config, config.eval)
    frame = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    rows = []
    for num in args.boxes:
        boxes = make_boxes(num)

        def prepare(boxes: np.ndarray = boxes) -> object:
            return decoding.load_images(cut(frame, boxes), height=height, width=width)

        def describe(boxes: np.ndarray = boxes) -> object:
            return appearance.get_features(boxes, frame)

        whole, before = clock(describe, args.repeats), clock(prepare, args.repeats)
        cells = (f"{1000 * whole:.1f}", f"{1000 * before:.1f}", f"{1 / whole:.1f}")
        rows.append((num, *cells, f"{num / whole:.1f}"))
    header = ("boxes", "ms a frame", "of it cut and resized, ms", "frames/s", "boxes/s")
    text = (
        f"Measured by `scripts/bench_tracking.py` on {common.describe_machine()}. "
        f"{common.describe_config(config)}.\n\n{common.format_table(header, rows)}"
    )
    common.publish(text, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

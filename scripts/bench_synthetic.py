"""Time how fast synthetic pictures are rendered and written.

python -m scripts.bench_synthetic --markdown bench_synthetic.md

Rendering is timed for what a store asks for: a whole split, from compiled code. CPU time per image
says what other programs on the machine cannot distort.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from mros_jax import console
from mros_jax.data.synthetic import dataset as synthetic
from scripts import common

HEADER = (
    "size",
    "images",
    "images/s, best",
    "images/s, median",
    "CPU ms per image",
    "first chunk, s",
    "written as JPEG, images/s",
)


def measure(height: int, width: int, preset: dict[str, int], repeats: int) -> list[str]:
    """The cells of `HEADER`."""
    dataset = synthetic.make_dataset(**{**preset, "height": height, "width": width})
    renderer = dataset.gallery.images
    assert isinstance(renderer, synthetic.Renderer)
    start = time.perf_counter()
    next(renderer.chunks())
    compiling = time.perf_counter() - start
    walls, cpus = [], []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        images = renderer.render()
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - cpu)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        synthetic.write_dataset(dataset, scratch, progress=False)
        written = sum(map(len, dataset.splits)) / (time.perf_counter() - start)
    count = len(images)
    return [
        f"{height} x {width}",
        f"{count:,}",
        f"{count / min(walls):,.0f}",
        f"{count / np.median(walls):,.0f}",
        f"{1e3 * min(cpus) / count:.2f}",
        f"{compiling:.1f}",
        f"{written:,.0f}",
    ]


def read_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH."""
    height, separator, width = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 128x64")
    return console.count(height), console.count(width)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--preset", choices=sorted(synthetic.PRESETS), default="demo")
    parser.add_argument(
        "--sizes",
        type=read_size,
        nargs="+",
        default=[(128, 64), (256, 128)],
        metavar="HEIGHTxWIDTH",
        help="sizes of the pictures",
    )
    common.add_repeats(parser, 5)
    common.add_markdown(parser)
    args = parser.parse_args(argv)
    preset = synthetic.PRESETS[args.preset]
    rows = [measure(height, width, preset, args.repeats) for height, width in args.sizes]
    what = f"gallery of the preset {args.preset}, {args.repeats} runs"
    table = common.format_table(HEADER, rows)
    common.publish(f"{what}; {common.describe_machine()}\n\n{table}", args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

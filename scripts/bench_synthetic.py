"""How fast synthetic pictures are rendered and written.

python scripts/bench_synthetic.py --markdown bench_synthetic.md

Rendering is timed for what a store asks for: a whole split, from compiled code. CPU time per image
says what other programs on the machine cannot distort.
"""

import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags

from mros_jax.data.synthetic import dataset as synthetic
from mros_jax.runs import provenance

_PRESET = flags.DEFINE_enum(
    "preset", "demo", sorted(synthetic.PRESETS), "Data set whose gallery is rendered."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs; the best and the median are shown.")
_SIZES = flags.DEFINE_list("sizes", ["128x64", "256x128"], "Picture sizes, HEIGHTxWIDTH.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "File to write the table to as well.")


def measure(size: str) -> list[str]:
    height, width = map(int, size.split("x"))
    preset = synthetic.PRESETS[_PRESET.value]
    dataset = synthetic.make_dataset(**{**preset, "height": height, "width": width})
    renderer = dataset.gallery.images
    assert isinstance(renderer, synthetic.Renderer)
    start = time.perf_counter()
    next(renderer.chunks())
    compiling = time.perf_counter() - start
    walls, cpus = [], []
    for _ in range(_REPEATS.value):
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
        size,
        f"{count:,}",
        f"{count / min(walls):,.0f}",
        f"{count / np.median(walls):,.0f}",
        f"{1e3 * min(cpus) / count:.2f}",
        f"{compiling:.1f}",
        f"{written:,.0f}",
    ]


def main(_: list[str]) -> None:
    head = [
        "size", "images", "images/s, best", "images/s, median", "CPU ms per image",
        "first chunk, s", "written as JPEG, images/s",
    ]  # fmt: skip
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *map(measure, _SIZES.value)]
    lines = [
        "### Synthetic pictures",
        "",
        f"Gallery of the `{_PRESET.value}` preset, {_REPEATS.value} runs. "
        f"{provenance.describe_machine()}.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if _MARKDOWN.value:
        pathlib.Path(_MARKDOWN.value).write_text(text)


if __name__ == "__main__":
    app.run(main)

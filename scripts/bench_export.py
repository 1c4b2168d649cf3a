"""Time exported files beside this library, on this machine's CPU.

    python -m scripts.bench_export --config configs/mros.py --config.weights=none

Takes a run with random weights of the config's network, on the small synthetic data set, and
exports it in every format and precision that is installed. All get the same uint8 images of 128 x
64 pixels and give descriptors, resize included; they take turns, and a row is the median of its
repeats.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mros_jax import console, extras
from mros_jax.export import build, stablehlo
from mros_jax.inference import load_model
from scripts import common

HEADER = ("form", "batch", "ms a batch", "range", "images/s", "file MB")
STORED = (128, 64)  # pixels of an image, as in Market-1501
Embed = Callable[[np.ndarray], Any]


def make_forms(run: pathlib.Path, sample: int) -> dict[str, tuple[Embed, float]]:
    """By name, what describes images, and the megabytes of its file.

    Args:
        run: what is exported.
        sample: images that each file is checked on.
    """
    embedder = load_model(run)
    forms: dict[str, tuple[Embed, float]] = {"ours": (embedder.embed, 0.0)}

    def megabytes(path: pathlib.Path) -> float:
        return path.stat().st_size / 1e6

    if extras.find_missing("stablehlo", "") is None:
        path = build.export(run, "stablehlo", sample=sample)
        with zipfile.ZipFile(path) as archive:
            forms["StableHLO"] = stablehlo.Session(archive.read(stablehlo.PROGRAM)), megabytes(path)
    if extras.find_missing("export", "") is None:
        from mros_jax.export import onnx_file

        for precision in build.PRECISIONS:
            path = build.export(run, "onnx", precision=precision, sample=sample)
            forms[f"ONNX, {precision}"] = onnx_file.Session(path.read_bytes()), megabytes(path)
    return forms


def measure(
    forms: Mapping[str, tuple[Embed, float]], batches: Sequence[int], repeats: int
) -> list[tuple[str, ...]]:
    """The table's rows."""
    rows: list[tuple[str, ...]] = []
    rng = np.random.default_rng(0)
    for batch in batches:
        images = rng.integers(0, 256, (batch, *STORED, 3), dtype=np.uint8)
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for turn in range(repeats + 1):
            for name, (embed, _) in forms.items():
                start = time.perf_counter()
                embed(images)
                if turn:  # the first compiles
                    seconds[name].append(time.perf_counter() - start)
        for name, (_, megabytes) in forms.items():
            median = statistics.median(seconds[name])
            rows.append(
                (
                    name,
                    str(batch),
                    f"{1000 * median:.1f}",
                    f"{1000 * min(seconds[name]):.1f}-{1000 * max(seconds[name]):.1f}",
                    f"{batch / median:.1f}",
                    f"{megabytes:.1f}" if megabytes else "",
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    common.add_repeats(parser, 10)
    common.add_markdown(parser)
    parser.add_argument("--batch", type=console.count, nargs="+", default=[1, 32])
    parser.add_argument("--sample", type=console.count, default=10, help="images of each check")
    config, args = common.parse_with_config(parser, argv)
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(
            _make(config, pathlib.Path(directory), args.sample), args.batch, args.repeats
        )
    print(f"{common.describe_config(config)}; {common.describe_machine()}")
    common.publish(common.format_table(HEADER, rows), args.markdown)
    return 0


def _make(
    config: ConfigDict, directory: pathlib.Path, sample: int
) -> dict[str, tuple[Embed, float]]:
    from tests.runs import begin_run

    with config.unlocked():
        config.dataset.name, config.dataset.preset = "synthetic", "small"
        config.dataset.cache_dir = os.fspath(directory / "cache")
    run = directory / "run"
    begin_run(run, config)
    return make_forms(run, sample)


if __name__ == "__main__":
    sys.exit(console.run(main))

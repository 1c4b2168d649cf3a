"""Write a run's network as one file: `python -m mros_jax.export RUN --format onnx`."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console, parallel
from mros_jax.export.build import FORMATS, PRECISIONS, export
from mros_jax.inference import CROPS
from mros_jax.runs.checkpoints import NAMES


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.export",
        description="Write a run's network as one file that needs nothing of this library.",
    )
    parser.add_argument("run", metavar="RUN", help="directory of the run (its --workdir)")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=pathlib.Path, help="file to write (default: RUN/model.*)")
    parser.add_argument("--checkpoint", choices=NAMES, default="last", help="of the run")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of an ONNX file's network"
    )
    parser.add_argument(
        "--flip_test",
        action=argparse.BooleanOptionalAction,
        help="mean of the descriptors of image and mirror image (default: as the run)",
    )
    parser.add_argument("--crops", choices=CROPS, help="mean over crops (default: as the run)")
    parser.add_argument("--root", help="where the run's data set is now (default: where it was)")
    parser.add_argument(
        "--sample",
        type=console.count,
        default=100,
        help="images that the file is compared with the run on (default: 100)",
    )
    args = parser.parse_args(argv)
    parallel.use_compilation_cache()
    path = export(
        args.run,
        args.format,
        args.out,
        checkpoint=args.checkpoint,
        precision=args.precision,
        flip_test=args.flip_test,
        crops=args.crops,
        root=args.root,
        sample=args.sample,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

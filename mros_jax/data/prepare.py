"""Store a data set as records: `python -m mros_jax.data.prepare --dataset market1501 ...`."""

import argparse
import sys
from collections.abc import Sequence

from mros_jax import console
from mros_jax.data.datasets import records


def main(argv: Sequence[str] | None = None) -> int:
    """Store a data set as records; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.data.prepare",
        description="Store a data set as ArrayRecord, for TFDS and for this library.",
        allow_abbrev=False,
    )
    names = sorted(record.name for record in records.DATASETS.values() if record.builder)
    parser.add_argument("--dataset", required=True, choices=names)
    parser.add_argument("--root", required=True, help="directory with the data as distributed")
    parser.add_argument("--out", required=True, help="TFDS data directory to write to")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    records.add_arguments(parser, names)
    args = parser.parse_args(argv)
    options = records.pick_options(vars(args))
    from mros_jax.data.datasets.prepared import prepare  # TensorFlow Datasets are slow to import

    print(prepare(args.dataset, args.root, args.out, on_bad_image=args.on_bad_image, **options))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

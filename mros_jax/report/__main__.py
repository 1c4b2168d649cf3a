"""Write a run's report: `python -m mros_jax.report RUN`.

Training does so at its end; this does it again, for instance after `python -m mros_jax.evaluate`
has evaluated another checkpoint.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console
from mros_jax.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.report", description="Write the report of a training run."
    )
    parser.add_argument("run", metavar="RUN", help="directory of the run (its --workdir)")
    parser.add_argument("--out", type=pathlib.Path, help="file to write (default: RUN/report.html)")
    parser.add_argument(
        "--queries",
        type=console.count,
        default=4,
        help="best, worst and random queries to show, of each",
    )
    parser.add_argument(
        "--top", type=console.count, default=10, help="places of a ranked list to show"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the random queries")
    args = parser.parse_args(argv)
    path = write_report(
        args.run, args.out, queries=args.queries, top=args.top, seed=args.seed, progress=True
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

"""Check published numbers: train the systems, evaluate as they were published, say what came out.

    python -m mros_jax.reproduce --root PATH/TO/Market-1501-v15.09.15 --estimate
    python -m mros_jax.reproduce --root PATH/TO/Market-1501-v15.09.15 --systems mros-IV,strong

Data and weights are checked first, and how long all will take is measured and said. Given again,
the same command goes on where it was. The report is OUT/reproduce.html, and .txt, .md, .csv, .json.
"""

import argparse
import logging
import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console
from mros_jax.campaign import costs, evaluations, imported, jobs, readiness, systems
from mros_jax.campaign.results import write_results
from mros_jax.errors import UserError
from mros_jax.runs.paper import load_tables

log = logging.getLogger("mros_jax.reproduce")  # also where this file is __main__


def _parse(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, tuple[systems.System, ...]]:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.reproduce",
        description=(__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--root", required=True, help="directory of Market-1501")
    systems.add_arguments(parser, preset="full")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="PEER=FILE",
        help="checkpoints of other code to evaluate beside them, see docs/import.md",
    )
    parser.add_argument(
        "--no_training", action="store_true", help="evaluate what --weights names, and no more"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/reproduce"),
        help="directory of the runs and the report (default: %(default)s)",
    )
    parser.add_argument(
        "--estimate",
        "--dry-run",
        action="store_true",
        help="check and say how long it will take, then stop",
    )
    parser.add_argument(
        "--repeats", type=console.count, default=3, help="timed steps of each system"
    )
    args, rest = parser.parse_known_args(argv)
    root = pathlib.Path(args.root).absolute()
    args.data_words = ["--config.dataset.name=market1501", f"--config.dataset.root={root}"]
    chosen, rest = systems.read_arguments(args, [*rest, *args.data_words])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.no_training and not args.weights:
        parser.error("--no_training needs --weights PEER=FILE: there is nothing else to evaluate")
    return args, chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0 where every run came to its end and was evaluated, else 1."""
    args, chosen = _parse(argv)
    paper = load_tables()
    planned = jobs.make_jobs(chosen, [] if args.no_training else args.seeds, args.out)
    weights = imported.read_weights(args.weights, args.out)
    with jobs.open_folder(args.out) as ledger:
        log.info("Checking data and weights")
        problems = readiness.find_problems(chosen, planned)
        if problems := problems + imported.import_all(weights, args.data_words, ledger):
            raise UserError(
                f"{len(problems)} things are to be mended first:\n  " + "\n  ".join(problems)
            )
        if args.no_training:
            chosen = ()
        if failures := costs.measure_all(chosen, args.out, args.repeats, again=False):
            listed = "\n  ".join(f"{name}: {why}" for name, why in failures.items())
            raise UserError(f"some steps of each system were tried, and failed for:\n  {listed}")
        measured = {s.name: cost for s in chosen if (cost := costs.load_cost(s, args.out))}
        if chosen:
            print(readiness.format_estimate(chosen, planned, measured, paper), flush=True)
        if args.estimate:
            return 0
        try:
            ready = evaluations.collect((), (), ledger, weights)  # soon done
            evaluated = [one.evaluate(paper, ledger) for one in ready]
            jobs.train(planned, ledger)
            trained = evaluations.collect(chosen, planned, ledger)
            evaluated += [one.evaluate(paper, ledger) for one in trained]
        finally:
            print(write_results(args.out, chosen, planned, ledger, paper, weights))
        return int(not all(evaluated) or any(ledger.failure(job.name) for job in planned))


if __name__ == "__main__":
    sys.exit(console.run(main))

"""All systems side by side: each config and variant, over seeds, on one data set.

    python -m scripts.benchmark_systems --out runs/systems             # trains, then the table
    python -m scripts.benchmark_systems --out runs/systems --measure   # speed and memory, the table
    python -m scripts.benchmark_systems --out runs/market --preset full \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15

Systems are trained one after another, each in a process of its own. Started again it goes on where
it was: complete runs are not repeated, one that was cut off is resumed, one that failed is tried
again. Ctrl-C saves the run that is being trained. A run that fails stands in the table with its
reason. `--measure` trains nothing and can be repeated on a quiet machine; what it finds is kept
apart. The table of what is there is written at each end: `systems.txt`, `systems.md`,
`systems.csv`, and accuracy against cost as `systems.svg`.
"""

import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console
from mros_jax.campaign import board, chart, costs, jobs, systems
from mros_jax.files import write_atomically
from mros_jax.runs.paper import load_tables
from scripts import common


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    systems.add_arguments(parser, preset="small")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="directory of the runs and the table"
    )
    parser.add_argument(
        "--measure", action="store_true", help="speed and memory of each system; trains nothing"
    )
    common.add_repeats(parser, 5)
    args, rest = parser.parse_known_args(argv)
    chosen, rest = systems.read_arguments(args, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    planned = jobs.make_jobs(chosen, args.seeds, args.out)
    with jobs.open_folder(args.out) as ledger:
        failed: dict[str, str] = {}
        try:
            if args.measure:
                failed = costs.measure_all(chosen, args.out, args.repeats)
            else:
                jobs.train(planned, ledger)
                failed = {job.name: why for job in planned if (why := ledger.failure(job.name))}
        finally:
            publish(args.out, chosen, planned, ledger)
    return int(bool(failed))


def publish(
    out: pathlib.Path,
    chosen: Sequence[systems.System],
    planned: Sequence[jobs.Job],
    ledger: jobs.Ledger,
) -> None:
    """Write the table of what there is, and print it."""
    paper = load_tables()
    lines = board.make_lines(chosen, planned, ledger, paper)
    text = board.format_lines(lines, markdown=False)
    files = {
        "systems.txt": text + "\n",
        "systems.md": board.format_lines(lines, markdown=True) + "\n",
        "systems.csv": board.format_csv(lines),
    }
    if drawn := chart.draw_file(lines):
        files["systems.svg"] = drawn
    for name, content in files.items():
        with write_atomically(out / name) as file:
            file.write(content)
    print(text)


if __name__ == "__main__":
    sys.exit(console.run(main))

"""Train the variants of a config over several seeds, one after another, and compare.

    python -m scripts.ablation --config configs/demo.py --variants I,II,III,IV --seeds 0,1,2 \
        --out runs/ablation
    python -m scripts.ablation --config configs/mros.py:duke --config.dataset.root=PATH \
        --out runs/duke

A config file names its variants in `VARIANTS`; for MROS they are the settings of the paper's Table
1. `--config.FIELD=VALUE` is given to every training. Writes `ablation.txt`, `ablation.csv` and
`ablation.png` to the directory of the runs. Started again it goes on where it was stopped; finished
runs are not repeated.
"""

import csv
import logging
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from mros_jax import console
from mros_jax.config import parse_config, read_variants
from mros_jax.errors import UserError
from mros_jax.files import write_atomically
from mros_jax.runs.paper import load_tables
from mros_jax.runs.run import Run
from scripts import common

METRICS = {"mAP": "mAP", "Rank-1": "rank1"}  # as shown: in the paper's tables
log = logging.getLogger("mros_jax.ablation")

# system -> ranking ("plain", "ecn") -> metric -> one score a seed, in percent
Scores = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
# system -> metric -> score in percent, without re-ranking
Paper = Mapping[str, Mapping[str, float]]


def train(config: str, overrides: Sequence[str], seed: int, workdir: pathlib.Path) -> None:
    """Train one variant with one seed, in a process of its own.

    Raises:
        UserError: the training did not come to its end.
    """
    command = [sys.executable, "-m", "mros_jax.train", f"--config={config}", *overrides]
    command += [f"--config.seed={seed}", f"--workdir={workdir}"]
    status = subprocess.run(command).returncode
    if status or not (workdir / "results.json").exists():
        raise UserError(f"the training of {workdir} stopped; see above")


def read_scores(workdirs: Mapping[str, Iterable[pathlib.Path]]) -> Scores:
    """The scores of finished runs, grouped by system."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for system, runs in workdirs.items():
        for run in runs:
            for result in Run(run).rankings:
                of_ranking = scores.setdefault(system, {}).setdefault(result["name"], {})
                for metric, value in zip(METRICS, (result["mAP"], result["cmc"][0]), strict=True):
                    of_ranking.setdefault(metric, []).append(100 * value)
    return scores


def read_paper() -> Paper:
    """The paper's scores of each system, without re-ranking."""
    tables = load_tables()["table"]
    return {
        row["system"]: {metric: row[key] for metric, key in METRICS.items() if key in row}
        for table in tables
        if "rerank" not in table
        for row in table["row"]
        if "system" in row
    }


def make_rows(scores: Scores, paper: Paper) -> list[dict[str, object]]:
    """One row a system and ranking: seeds, mean and standard deviation, the paper's score."""
    rows = []
    for system, rankings in scores.items():
        for ranking, metrics in rankings.items():
            theirs = paper.get(system, {}) if ranking == "plain" else {}
            row: dict[str, object] = {"system": system, "ranking": ranking}
            for metric, values in metrics.items():
                row["seeds"] = len(values)
                row[metric] = round(statistics.mean(values), 2)
                row[f"{metric} std"] = round(statistics.stdev(values), 2) if values[1:] else ""
                row[f"{metric} paper"] = theirs.get(metric, "")
            rows.append(row)
    return rows


def plot(scores: Scores, paper: Paper, path: pathlib.Path) -> None:
    """Mean, standard deviation and every seed by system, beside the paper's Market-1501 scores."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    systems = list(scores)
    for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        for ranking in next(iter(scores.values())):
            values = [scores[system][ranking][metric] for system in systems]
            means = [statistics.mean(v) for v in values]
            spread = [statistics.stdev(v) if v[1:] else 0.0 for v in values]
            axes.errorbar(systems, means, spread, marker="o", capsize=4, label=f"ours, {ranking}")
            for system, of_system in zip(systems, values, strict=True):
                axes.plot([system] * len(of_system), of_system, ".", color="grey", alpha=0.5)
        if known := [system for system in systems if metric in paper.get(system, {})]:
            theirs = [paper[system][metric] for system in known]
            axes.plot(known, theirs, "k--", marker="x", label="paper, Market-1501")
        axes.set(title=f"{metric} (%)")
        axes.legend()
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def name_systems(config: str, variants: Sequence[str], overrides: Sequence[str]) -> dict[str, str]:
    """Read every variant's config before the first training.

    Returns:
        Name of the system -> its `--config`.

    Raises:
        UserError: the config cannot be read; two variants of one name.
    """
    systems: dict[str, str] = {}
    path, _, argument = config.partition(":")
    for variant in variants:
        text = ":".join(filter(None, (path, ",".join(filter(None, (argument, variant))))))
        parsed, _ = parse_config([f"--config={text}", *overrides])
        assert parsed is not None
        if parsed.name in systems:
            raise UserError(f"{systems[parsed.name]} and {text} are both named {parsed.name}")
        systems[parsed.name] = text
    return systems


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--variants", metavar="A,B", help="of the config (default: all it has)")
    parser.add_argument("--seeds", metavar="A,B", default="0,1,2", help="of every variant")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="directory of the runs and the tables"
    )
    _, args = common.parse_with_config(parser, argv)
    overrides = args.config_words[1:]
    offered = read_variants(args.config.partition(":")[0])
    variants = offered if args.variants is None else args.variants.split(",")
    if unknown := [variant for variant in variants if variant not in offered]:
        parser.error(f"no variants {', '.join(unknown)}; there are {', '.join(offered)}")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds} are not numbers with commas between them")
    workdirs: dict[str, list[pathlib.Path]] = {}
    for system, config in name_systems(args.config, variants, overrides).items():
        for seed in seeds:
            workdir = args.out.absolute() / f"{system}-seed{seed}"
            log.info("%s, seed %d: %s", system, seed, workdir)
            train(config, overrides, seed, workdir)
            workdirs.setdefault(system, []).append(workdir)
    scores, paper = read_scores(workdirs), read_paper()
    rows = make_rows(scores, paper)
    table = common.format_table(list(rows[0]), [list(row.values()) for row in rows])
    with write_atomically(args.out / "ablation.txt") as file:
        file.write(table + "\n")
    with write_atomically(args.out / "ablation.csv") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(scores, paper, args.out / "ablation.png")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

"""Trains the settings of the paper's Table 1 over several seeds, one after another, and compares.

    python scripts/ablation.py --config configs/demo.py --seeds 0,1,2 --out runs/ablation
    python scripts/ablation.py --config configs/mros.py:duke --out runs/duke -- \
        --config.dataset.root=PATH

Writes `ablation.txt`, `ablation.csv` and `ablation.png` to the directory of the runs. Started
again it goes on where it was stopped; finished runs are not repeated. What follows `--` is given to
every training.
"""

import csv
import logging
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from absl import app, flags

from mros_jax import console
from mros_jax.runs.paper import load_tables
from mros_jax.runs.run import Run

_CONFIG = flags.DEFINE_string("config", "configs/mros.py", "Config file, with arguments or not.")
_SETTINGS = flags.DEFINE_list("settings", ["I", "II", "III", "IV"], "Settings to train.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every setting.")
_OUT = flags.DEFINE_string("out", "runs/ablation", "Directory of the runs and the tables.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
METRICS = ("mAP", "Rank-1")
log = logging.getLogger("mros_jax.ablation")

# setting -> ranking ("plain", "ecn") -> metric -> one score per seed, in percent
Scores = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]


def train(config: str, setting: str, seed: int, workdir: pathlib.Path, extra: list[str]) -> None:
    """Trains one setting with one seed, in a process of its own."""
    argument = f"{config},{setting}" if ":" in config else f"{config}:{setting}"
    command = [sys.executable, "-m", "mros_jax.train", f"--config={argument}"]
    command += [f"--config.seed={seed}", f"--workdir={workdir}", *extra]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status or not (workdir / "results.json").exists():
        raise SystemExit(f"training of setting {setting}, seed {seed} stopped; see above")


def read_scores(workdirs: Mapping[str, Iterable[pathlib.Path]]) -> Scores:
    """The scores of finished runs, grouped by setting."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for setting, runs in workdirs.items():
        for run in runs:
            for result in Run(run).rankings:
                of_ranking = scores.setdefault(setting, {}).setdefault(result["name"], {})
                for metric, value in zip(METRICS, (result["mAP"], result["cmc"][0]), strict=True):
                    of_ranking.setdefault(metric, []).append(100 * value)
    return scores


def read_paper() -> dict[str, dict[str, float]]:
    """The paper's Table 1, in percent: setting -> metric -> score."""
    rows = next(table["row"] for table in load_tables()["table"] if table["number"] == 1)
    return {row["setting"]: {"mAP": row["mAP"], "Rank-1": row["rank1"]} for row in rows}


def make_rows(scores: Scores, paper: Mapping[str, Mapping[str, float]]) -> list[dict[str, object]]:
    """One row per setting and ranking: seeds, mean and standard deviation, the paper's score."""
    rows = []
    for setting, rankings in scores.items():
        for ranking, metrics in rankings.items():
            row: dict[str, object] = {"setting": setting, "ranking": ranking}
            for metric, values in metrics.items():
                row["seeds"] = len(values)
                row[metric] = round(statistics.mean(values), 2)
                row[f"{metric} std"] = round(statistics.stdev(values), 2) if values[1:] else ""
                row[f"{metric} paper"] = paper[setting][metric] if ranking == "plain" else ""
            rows.append(row)
    return rows


def format_rows(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a Markdown table."""
    header = list(rows[0])
    cells = [header, ["---"] * len(header), *([str(row[h]) for h in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = (
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )
    return "\n".join(lines) + "\n"


def plot(scores: Scores, paper: Mapping[str, Mapping[str, float]], path: pathlib.Path) -> None:
    """Mean, standard deviation and every seed by setting, beside the paper's Market-1501 scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    settings = list(scores)
    for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        for ranking in next(iter(scores.values())):
            values = [scores[s][ranking][metric] for s in settings]
            means = [statistics.mean(v) for v in values]
            spread = [statistics.stdev(v) if v[1:] else 0.0 for v in values]
            axes.errorbar(settings, means, spread, marker="o", capsize=4, label=f"ours, {ranking}")
            for setting, of_setting in zip(settings, values, strict=True):
                axes.plot([setting] * len(of_setting), of_setting, ".", color="grey", alpha=0.5)
        axes.plot(settings, [paper[s][metric] for s in settings], "k--", label="paper, Market-1501")
        axes.set(title=f"{metric} (%)", xlabel="setting")
        axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    """Command line."""
    console.show_messages()
    out = pathlib.Path(_OUT.value).absolute()
    paper = read_paper()
    unknown = set(_SETTINGS.value) - paper.keys()
    if unknown:
        raise app.UsageError(f"unknown settings {sorted(unknown)}; the paper has {sorted(paper)}")
    workdirs: dict[str, list[pathlib.Path]] = {}
    for setting in _SETTINGS.value:
        for seed in map(int, _SEEDS.value):
            workdir = out / f"{setting}-seed{seed}"
            log.info("Setting %s, seed %d: %s", setting, seed, workdir)
            train(_CONFIG.value, setting, seed, workdir, argv[1:])
            workdirs.setdefault(setting, []).append(workdir)
    scores = read_scores(workdirs)
    rows = make_rows(scores, paper)
    table = format_rows(rows)
    (out / "ablation.txt").write_text(table)
    with (out / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(scores, paper, out / "ablation.png")
    print(table)
    log.info("Wrote ablation.txt, ablation.csv and ablation.png to %s", out)


if __name__ == "__main__":
    app.run(main)

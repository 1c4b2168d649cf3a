"""The scripts around training, run as a user would."""

import csv
import json
import subprocess
import sys

import jax
import pytest
from PIL import Image

from tests.training import ROOT, TINY


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("XLA_FLAGS", "")


def _run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ablation_trains_settings_and_seeds(tmp_path, environment):
    out = tmp_path / "ablation"
    tiny = {**TINY, "num_epochs": 1, "dataset.cache_dir": tmp_path / "cache"}
    overrides = [f"--config.{name}={value}" for name, value in tiny.items()]
    command = ["scripts/ablation.py", "--config=configs/demo.py", "--settings=II", "--seeds=3,4"]
    printed = _run(*command, f"--out={out}", "--", *overrides)
    with (out / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["ranking"] for row in rows] == ["plain", "ecn"]
    scores = []
    for seed in (3, 4):
        run = out / f"II-seed{seed}"
        assert json.loads((run / "config.json").read_text())["seed"] == seed
        scores.append(json.loads((run / "results.json").read_text())["results"][0]["mAP"])
    assert float(rows[0]["mAP"]) == pytest.approx(100 * sum(scores) / 2, abs=0.006)
    assert float(rows[0]["mAP std"]) == pytest.approx(
        100 * abs(scores[0] - scores[1]) / 2**0.5, abs=0.006
    )
    assert rows[0]["mAP paper"] == "82.8"
    assert (out / "ablation.txt").read_text() in printed
    with Image.open(out / "ablation.png") as picture:
        assert picture.width > 1000


def test_schedule_is_plotted(tmp_path, environment):
    _run("scripts/plot_schedule.py", f"--out={tmp_path / 'schedule.png'}", "--steps_per_epoch=3")
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.width > 1000


def test_training_benchmark_prints_its_table(environment):
    tiny = [f"--config.{name}={value}" for name, value in TINY.items()]
    printed = _run("scripts/bench_train.py", "--steps=2", "--config=configs/demo.py", *tiny)
    for what in ("cold compilation cache", "share of the data path", "peak memory"):
        assert what in printed

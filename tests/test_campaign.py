"""Many systems over many seeds: what is trained, what is left out, and the tables."""

import argparse
import csv
import dataclasses
import io
import json
import math
import multiprocessing
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import unittest.mock
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import scipy  # whose modules are imported when they are used

from mros_jax import config as configs
from mros_jax import console, train
from mros_jax.campaign import board, chart, costs, jobs, summary, systems
from mros_jax.errors import UserError
from mros_jax.models.counting import count_multiply_adds
from mros_jax.runs import paper as papers
from scripts import benchmark_systems
from tests.least import write_config
from tests.training import ROOT, TINY

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def least(tmp_path, cache_dir, monkeypatch):
    """The words of a campaign of the least system, trained in this process."""
    words = write_config(tmp_path, cache_dir, monkeypatch)
    monkeypatch.setattr(jobs, "run_process", run_here)
    return [
        f"--configs={tmp_path / 'mean.py'}",
        *words[1:],
        "--config.num_epochs=1",
        "--config.eval.rerank=()",
    ]


def run_here(words, file):
    """As `jobs.run_process`, without a process."""
    assert words[0] == "mros_jax.train"
    try:
        return train.main(words[1:])
    except UserError as error:
        file.write_text(f"I 12:00:00 Devices\nerror: {error}\n")
        return 2


def test_every_variant_of_every_config_is_found():
    found = systems.find_systems()
    assert len(found) == sum(len(configs.read_variants(f)) for f in configs.list_configs())
    names = {system.name for system in found}
    assert {"mros-IV", "mros-I", "dare", "dare-densenet201", "tbn_plus-reconstruction"} <= names
    for system in found:
        assert system.read().name == system.name


def test_systems_are_chosen_by_name():
    found = systems.find_systems()
    assert [s.name for s in systems.choose(found, ["mros-I*", "trinet"])] == [
        *("mros-IV", "mros-III", "mros-II", "mros-I", "trinet")
    ]
    assert systems.choose(found, []) == found
    with pytest.raises(UserError, match=r"no system is named trnet \(did you mean trinet\?\)"):
        systems.choose(found, ["trnet"])
    with pytest.raises(UserError, match=r"there are .*mfbn, .*mros-IV, .*pcb_rpp"):
        systems.choose(found, ["nothing"])


def test_a_preset_is_the_changes_that_make_it():
    """The words of each system give the small config that `shrink` makes."""
    for system in systems.prepare(systems.find_systems(), preset="small"):
        path, _, variant = system.file.partition(":")
        expected = configs.shrink(configs.read(path, variant or None).unlock())
        assert system.read().to_dict() == expected.to_dict()
    found = systems.find_systems()
    assert systems.prepare(found) == found


def test_a_run_of_other_length():
    chosen = systems.choose(systems.find_systems(), ["mros-IV", "pcb_rpp", "trinet", "mfbn"])
    short = systems.prepare(
        chosen, preset="small", epochs=2, overrides=["--config.batch.identities=8"]
    )
    by_name = {system.name: system.read() for system in short}
    assert by_name["mros-IV"].num_epochs == 2
    assert by_name["mros-IV"].schedule.decay_epochs == (1,)
    stages = by_name["pcb_rpp"].stages
    assert by_name["pcb_rpp"].num_epochs == sum(stage.epochs for stage in stages.values()) == 3
    assert "identities" not in by_name["pcb_rpp"].batch
    # 1152 images are 36 batches of 8 x 4.
    assert by_name["trinet"].num_steps == 2 * 36
    assert by_name["trinet"].schedule.decay_start == int(15_000 * 72 / 25_000)
    for config in by_name.values():
        configs.split_stages(config)


def test_fields_that_no_system_has():
    found = systems.choose(systems.find_systems(), ["hacnn", "mros-IV"])
    [hacnn, mros] = systems.prepare(found, overrides=["--config.network.trunk=tiny"])
    assert hacnn.changes == ()
    assert mros.changes == ("--config.network.trunk=tiny",)
    with pytest.raises(UserError, match="did you mean num_epochs"):
        systems.prepare(found, overrides=["--config.num_epoch=3"])
    with pytest.raises(UserError, match="num_epochs"):
        systems.prepare(found, overrides=["--config.num_epochs=many"])


def test_a_campaign_goes_on_where_it_was(tmp_path, least, monkeypatch, capsys):
    """One run fails, and the other is not repeated when the command is given again."""
    out = tmp_path / "out"
    command = [*least, f"--out={out}", "--seeds=0,1"]
    blocked = out / "runs" / "mean-seed1"
    blocked.mkdir(parents=True)
    (blocked / "thesis.txt").write_text("not a run")
    assert console.run(benchmark_systems.main, command) == 1
    printed = capsys.readouterr().out
    assert "mean, seed 1:" in printed
    assert "is not empty and not a run (it holds thesis.txt)" in printed
    assert "1 of 2" in printed

    first = (out / "runs" / "mean-seed0" / "results.json").stat().st_mtime_ns
    (blocked / "thesis.txt").unlink()
    assert console.run(benchmark_systems.main, command) == 0
    assert (out / "runs" / "mean-seed0" / "results.json").stat().st_mtime_ns == first
    ledger = json.loads((out / "ledger.json").read_text())
    assert {name: entry["failure"] for name, entry in ledger.items()} == {
        "mean-seed0": None,
        "mean-seed1": None,
    }
    assert all(entry["seconds"] > 0 for entry in ledger.values())
    [row] = csv.DictReader(io.StringIO((out / "systems.csv").read_text()))
    values = [
        100
        * json.loads((out / "runs" / f"mean-seed{i}/results.json").read_text())["results"][0]["mAP"]
        for i in (0, 1)
    ]
    assert row["seeds"] == "0 1"
    assert row["missing"] == ""
    assert float(row["mAP"]) == pytest.approx(statistics.fmean(values), abs=1e-3)
    assert float(row["mAP_std"]) == pytest.approx(statistics.stdev(values), abs=1e-3)
    assert "Missing" not in (out / "systems.md").read_text()

    # Another recipe under the same name is no result of this one.
    assert console.run(benchmark_systems.main, [*command, "--config.augment.flip=0.25"]) == 1
    assert "belongs to a run of another config" in capsys.readouterr().out


def test_what_a_training_says_last(tmp_path, least, capsys):
    command = [*least, f"--out={tmp_path / 'out'}", "--seeds=0", "--config.batch.identities=500"]
    assert console.run(benchmark_systems.main, command) == 1
    printed = capsys.readouterr().out
    assert "identities" in printed
    assert "exit code 2; see" in printed


def test_one_campaign_at_a_time(tmp_path, least, capsys):
    out = tmp_path / "out"
    with jobs.open_folder(out):
        assert console.run(benchmark_systems.main, [*least, f"--out={out}"]) == console.MISUSE
    assert "give another --out" in capsys.readouterr().err
    (out / "ledger.json").write_text("[]")
    assert console.run(benchmark_systems.main, [*least, f"--out={out}"]) == console.MISUSE
    assert "is no ledger of jobs" in capsys.readouterr().err


def test_speed_and_memory_are_measured_apart(tmp_path, least, monkeypatch, capsys):
    """Nothing is trained; what another config cost is not shown."""
    monkeypatch.setattr(
        costs, "measure_apart", lambda words, repeats: costs.measure(words, repeats, time.time())
    )
    out = tmp_path / "out"
    command = [*least, f"--out={out}", "--seeds=0", "--measure", "--repeats=1"]
    assert console.run(benchmark_systems.main, command) == 0
    assert not (out / "runs").exists()
    printed = capsys.readouterr().out
    assert "mean, seed 0: not trained yet" in printed
    [system] = systems.read_arguments(*parse(command))[0]
    cost = costs.load_cost(system, out)
    assert cost is not None
    assert cost.parameters == 3 * 12 + 12
    assert cost.multiply_adds == 0  # of the descriptor: a mean of pixels
    assert (cost.descriptor, cost.batch, cost.passes) == (3, 8, 1)
    assert cost.test_images == 24 + 55
    assert min(cost.step_seconds, cost.extract_seconds, cost.rank_seconds) > 0
    assert cost.host_bytes > 100e6
    assert f"{cost.train_speed:.0f}" in printed
    other = systems.prepare([system], overrides=["--config.dtype=bfloat16"])[0]
    assert costs.load_cost(other, out) is None
    broken = [*command, "--config.batch.identities=500"]
    assert console.run(benchmark_systems.main, broken) == 1


def parse(command):
    parser = argparse.ArgumentParser()
    systems.add_arguments(parser, preset="small")
    args, rest = parser.parse_known_args(command)
    return args, [word for word in rest if word.startswith("--config.")]


def test_interval_of_one_more_run():
    """Nineteen in twenty of further values lie within it, whatever mean and spread."""
    rng = np.random.default_rng(0)
    values = rng.normal(80, 3, (4000, 4))
    ends = [summary.estimate(row[:3].tolist()) for row in values]
    inside = [low <= row[3] <= high for row, (low, high) in zip(values, ends, strict=True)]
    assert statistics.fmean(inside) == pytest.approx(0.95, abs=0.012)
    low, high = summary.estimate([1.0, 2.0, 4.0])
    half = scipy.stats.t(2).ppf(0.975) * statistics.stdev([1, 2, 4]) * math.sqrt(4 / 3)
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def make_line(name, mAP, adds, **changes):
    cost = costs.Cost(
        words=(),
        parameters=1_500_000,
        multiply_adds=adds,
        passes=1,
        descriptor=128,
        batch=64,
        steps=1000,
        step_seconds=0.5,
        extract_seconds=0.01,
        rank_seconds=2.0,
        start_seconds=30.0,
        evaluations=4,
        test_images=1000,
        host_bytes=2_000_000_000,
        device_bytes=None,
        device="1 x cpu",
        load=1.0,
        commit="abc",
    )
    scores = {"mAP": summary.Score((mAP - 1, mAP + 1), mAP - 5, mAP + 5)}
    line = board.Line(name, (0, 1), scores, {}, {}, 1.5, cost, {})
    return dataclasses.replace(line, **changes)


def test_cost_of_a_run_is_foretold():
    cost = make_line("a", 50, 10).cost
    assert cost is not None
    assert cost.train_speed == 128
    assert cost.evaluate_seconds == pytest.approx(12)
    assert cost.run_seconds == pytest.approx(30 + 500 + 4 * 12)


def test_the_published_row_is_the_reports(tmp_path):
    """Of HA-CNN's two rows that of its paper, whatever else is noted of the other."""
    [hacnn] = systems.choose(systems.find_systems(), ["hacnn"])
    planned = jobs.make_jobs([hacnn], [0], tmp_path)
    [line] = board.make_lines([hacnn], planned, jobs.Ledger(tmp_path), papers.load_tables())
    assert (line.published["name"], line.published["mAP"]) == ("HA-CNN", 75.7)


def test_a_bug_in_measuring_keeps_its_traceback(monkeypatch, caplog):
    receiving, sending = multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr(console, "show_messages", lambda: None)
    for error, said in ((UserError("no room"), "no room"), (IndexError("x"), "IndexError: x")):
        monkeypatch.setattr(costs, "measure", unittest.mock.Mock(side_effect=error))
        caplog.clear()
        costs._answer(sending, ["--config=a.py"], 1, 0.0)
        assert receiving.recv() == said
        assert [r.exc_info[1] for r in caplog.records] == [error] * (said != "no room")


def test_table_beside_published_numbers():
    published = {"mAP": 69.14, "rank1": 84.92, "protocol": {"crops": "ten", "ap": "trapezoid"}}
    lines = [
        make_line("trinet", 60.0, 10_000_000, published=published),
        make_line("b", 50.0, 1, cost=None, missing={2: "diverged\nat step 3"}),
    ]
    text = board.format_lines(lines, markdown=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    trinet, cheap = (next(row for row in rows if row[:1] == [name]) for name in ("trinet", "b"))
    assert trinet[2] == "60.0 [55.0, 65.0]"
    assert trinet[-2:] == ["69.14 / 84.92", "ten crops, trapezoid AP"]
    assert cheap[1] == "2 of 3"
    assert "These runs took 6 min in all" in text
    assert "b, seed 2: diverged at step 3" in text
    assert "| trinet | 1.50 M | 10.0 M | 1 | 128 | 128 | 100 | 2.00 GB | 1.5 min |" in text


def test_names_in_the_plot_hide_nothing():
    """Twenty systems of nearly one cost and score: no two of their names overlap."""
    rng = np.random.default_rng(0)
    lines = [
        make_line(f"system-{i}", 60 + rng.normal(), int(1e9 * rng.uniform(1, 1.3)))
        for i in range(20)
    ]
    svg = chart.draw_file(lines)
    assert svg is not None
    root = ET.fromstring(svg)
    assert "prefers-color-scheme: dark" in svg
    texts = [e for e in root.iter() if e.tag.endswith("text") and (e.text or "").startswith("sys")]
    assert len(texts) == 20
    boxes = []
    for element in texts:
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        half = 2.3 * len(element.text or "")  # points, of a font of 9
        boxes.append((x - half, y - 7, x + half, y))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert chart.draw_file(lines[:1]) is None


@pytest.mark.slow
def test_ctrl_c_loses_nothing(tmp_path, cache_dir):
    """The run that is being trained is saved, and resumed by the same command."""
    out = tmp_path / "out"
    words = [f"--config.{k}={v}" for k, v in TINY.items() if k not in ("num_epochs", "seed")]
    command = [sys.executable, "-m", "scripts.benchmark_systems", f"--out={out}"]
    command += ["--systems=strong", "--seeds=0", "--epochs=8", *words]
    command += [f"--config.dataset.cache_dir={cache_dir}"]
    metrics = out / "runs" / "strong-seed0" / "metrics.jsonl"
    # A shell may have told all that it started to ignore it, and they would tell theirs.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, former)
    while not metrics.exists() or not metrics.stat().st_size:  # has taken steps
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    printed, _ = started.communicate(timeout=120)
    assert started.returncode == console.INTERRUPTED
    assert "strong, seed 0: not trained yet" in printed
    run = pathlib.Path(metrics.parent)
    assert list((run / "checkpoints" / "last").glob("[0-9]*"))
    steps = len(metrics.read_text().splitlines())
    assert 0 < steps < 8 * 9
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((run / "run.json").read_text())["earlier_starts"]) == 1


@pytest.mark.slow
def test_a_process_of_its_own_measures(cache_dir):
    """Its peak is not that of this one, and what it cannot do is said here."""
    words = [f"--config.{k}={v}" for k, v in TINY.items()]
    words += [f"--config.dataset.cache_dir={cache_dir}"]
    chosen = systems.choose(systems.find_systems(), ["strong"])
    [system] = systems.prepare(chosen, preset="small", overrides=words)
    cost = costs.measure_apart(system.words, 1)
    network = configs.make_network(system.read(), 12)
    assert cost.multiply_adds == count_multiply_adds(network, 96, 32)["descriptor"]
    assert (cost.descriptor, cost.batch) == (network.parts(96, 32)[0].size, 8)
    assert cost.start_seconds > 1
    with pytest.raises(UserError, match="identities"):
        costs.measure_apart((*system.words, "--config.batch.identities=500"), 1)

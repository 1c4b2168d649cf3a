"""The scripts: by their `main`, and in a process of their own where they start others."""

import argparse
import csv
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.data import batches
from mros_jax.errors import UserError
from mros_jax.models.counting import count_multiply_adds
from mros_jax.models.torch_weights import to_torch_state_dict
from mros_jax.training import recipe
from mros_jax.training.feed import Feed
from scripts import (
    ablation,
    bench_convolutions,
    bench_gpu,
    bench_model,
    bench_train,
    common,
    plot_schedule,
    show_batch,
)
from tests.least import write_config
from tests.recorded import TORCH
from tests.training import JAX_CONFIG, ROOT, TINY

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS = ["--config=configs/demo.py", *(f"--config.{name}={value}" for name, value in TINY.items())]
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text())


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", JAX_CONFIG.jax_compilation_cache_dir)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.chdir(ROOT)


@pytest.fixture
def words(cache_dir):
    return [*WORDS, f"--config.dataset.cache_dir={cache_dir}"]


@pytest.fixture
def least(tmp_path, cache_dir, monkeypatch):
    return write_config(tmp_path, cache_dir, monkeypatch)


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_command_line(name, capsys):
    """Each has --help with its docstring's first line, and ends with 2 where it is misused."""
    main = importlib.import_module(f"scripts.{name}").main
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.count(f"python -m scripts.{name}") >= 1
    assert console.run(main, ["--no_such_flag"]) == console.MISUSE


def test_a_field_that_a_config_does_not_have(words, capsys):
    assert console.run(plot_schedule.main, [*words, "--config.objective.triplet.margn=1"]) == 2
    assert "did you mean margin?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot_schedule.main([*words, "--step_per_epoch=3"])
    assert "unrecognized arguments: --step_per_epoch=3" in capsys.readouterr().err


@pytest.mark.slow
def test_ablation_trains_variants_and_seeds(tmp_path, words):
    out = tmp_path / "ablation"
    options = ["--variants=II", "--seeds=3,4", f"--out={out}", "--config.num_epochs=1"]
    command = [sys.executable, "-m", "scripts.ablation", *words, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (out / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["system"], row["ranking"]) for row in rows] == [
        ("mros-II", "plain"),
        ("mros-II", "ecn"),
    ]
    scores = []
    for seed in (3, 4):
        run = out / f"mros-II-seed{seed}"
        assert json.loads((run / "config.json").read_text())["seed"] == seed
        scores.append(json.loads((run / "results.json").read_text())["results"][0]["mAP"])
    assert float(rows[0]["mAP"]) == pytest.approx(100 * sum(scores) / 2, abs=0.006)
    assert float(rows[0]["mAP std"]) == pytest.approx(
        100 * abs(scores[0] - scores[1]) / 2**0.5, abs=0.006
    )
    assert rows[0]["mAP paper"] == "82.8"
    assert (out / "ablation.txt").read_text() in done.stdout
    with Image.open(out / "ablation.png") as picture:
        assert picture.width > 1000


def test_ablation_reads_every_config_before_it_trains(words, monkeypatch, tmp_path, capsys):
    trained = []
    monkeypatch.setattr(ablation, "train", lambda *arguments: trained.append(arguments))
    command = [*words, f"--out={tmp_path}"]
    assert console.run(ablation.main, [*command, "--config.name=same"]) == console.MISUSE
    assert "are both named same" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablation.main([*command, "--variants=II,V"])
    assert "no variants V; there are IV, III, II, I" in capsys.readouterr().err
    assert not trained
    assert configs.read_variants("configs/mros.py") == ("IV", "III", "II", "I")
    assert ablation.name_systems("configs/mros.py:duke", ("I",), ()) == {
        "mros-I": "configs/mros.py:duke,I"
    }


def test_ablation_of_a_system_that_the_paper_does_not_have(tmp_path):
    scores = {"other": {"plain": {"mAP": [50.0], "Rank-1": [60.0]}}}
    paper = ablation.read_paper()
    assert paper["mros-IV"] == {"mAP": 84.2, "Rank-1": 94.4}
    [row] = ablation.make_rows(scores, paper)
    assert row["mAP"] == 50
    assert row["mAP paper"] == row["mAP std"] == ""
    ablation.plot(scores, paper, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_schedule_has_a_line_for_each_group(tmp_path, words, monkeypatch):
    labels: list[str] = []
    save = Figure.savefig

    def savefig(self, *arguments, **options):
        labels.extend(line.get_label() for line in self.axes[0].lines)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    out = tmp_path / "schedule.png"
    assert plot_schedule.main([*words, "--steps_per_epoch=3", f"--out={out}"]) == 0
    assert sorted(labels) == ["centers", "network"]
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_schedule_of_a_run_in_stages(tmp_path, monkeypatch):
    """A line has a gap where its group is frozen."""
    lines = {}
    save = Figure.savefig

    def savefig(self, *arguments, **options):
        lines.update({line.get_label(): line.get_ydata() for line in self.axes[0].lines})
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    words = ["--config=configs/pcb_rpp.py", "--steps_per_epoch=2", f"--out={tmp_path / 'a.png'}"]
    assert plot_schedule.main(words) == 0
    steps = [0, 78, 80, 119, 120, 129, 130, 149]
    nan = np.nan
    expected = {
        "trunk": [0.01, 0.01, 0.001, 0.001, nan, nan, 0.001, 0.001],
        "heads": [0.1, 0.1, 0.01, 0.01, nan, nan, 0.01, 0.01],
        "part_classifier": [nan, nan, nan, nan, 0.01, 0.01, 0.01, 0.01],
    }
    for name, rates in expected.items():
        np.testing.assert_allclose(lines.pop(name)[steps], rates, rtol=1e-6)
    assert not lines


@pytest.mark.slow
def test_show_batch_draws_what_the_step_is_given(tmp_path, least):
    """The right half of each pair is what the run's own step sees, at any step."""
    out = tmp_path / "batch.png"
    step = 11
    options = [f"--step={step}", "--rows=2", f"--out={out}"]
    assert show_batch.main([*least, *options]) == 0
    with Image.open(out) as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (2 * (96 + 4), 4 * (32 + 4), 3)
    seen = see_batch(configs.parse_config(least)[0], step)
    for i in range(4):
        row, column = divmod(i, 2)
        top, left = row * 100 + 4, (2 * column + 1) * 36 + 4
        np.testing.assert_array_equal(
            sheet[top : top + 96, left : left + 32], show_batch.to_levels(seen[i])
        )


def see_batch(config, number):
    """The images that the network of a run sees in a step, by the run's own feed and step."""
    dataset = configs.load_dataset(config)
    feed = Feed(config, dataset)
    seen: list[np.ndarray] = []
    augment_batch = recipe.make_augment(config)

    def spy(images, keys):
        augmented = augment_batch(images, keys)
        jax.debug.callback(seen.append, augmented)
        return augmented

    steps = feed.sizes.steps_per_epoch
    parts = recipe.build(config, dataset.num_classes, steps, augment_batch=spy)
    indices = np.asarray(next(feed.epoch(*divmod(number, steps)))["indices"]).reshape(-1)
    devices = jax.devices()[:1]
    state = parallel.replicate(dataclasses.replace(parts.state, step=jnp.int32(number)), devices)
    data = parallel.replicate(jax.device_get(feed.data), devices)
    batch = parallel.split({"indices": indices}, devices)
    jax.block_until_ready(parallel.MappedStep(parts.step, devices)(state, data, batch))
    jax.effects_barrier()
    return np.asarray(seen[0])


@pytest.mark.parametrize("sampler", ["identities", "shuffled", "probes_and_gallery"])
def test_show_batch_of_any_sampler(sampler, tmp_path, monkeypatch):
    config = tmp_path / "config.py"
    sizes = {
        "identities": {"identities": 2, "images": 2},
        "shuffled": {"size": 3},
        "probes_and_gallery": {"probes": 2, "gallery": 1},
    }
    section = {"sampler": sampler, **sizes[sampler]}
    config.write_text(
        "from mros_jax.config import read\n"
        "def get_config(arg):\n"
        f"    config = read({str(ROOT / 'configs' / 'mros.py')!r}, arg).unlock()\n"
        f"    config.batch = {section}\n"
        "    return config\n"
    )
    data = f"--config.dataset.root={ROOT / 'tests/data/pedestrians'}"
    cache = f"--config.dataset.cache_dir={tmp_path / 'cache'}"
    words = [f"--config={config}", "--config.dataset.name=folder", data, cache]
    out = tmp_path / "batch.png"
    words += ["--config.input.height=96", "--config.input.width=16"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    plan = mock.Mock(wraps=batches.plan_probes)
    monkeypatch.setattr(batches, "plan_probes", plan)
    assert show_batch.main([*words, f"--out={out}"]) == 0
    rows, columns = (3, 1) if sampler == "shuffled" else (2, 2)
    if sampler == "probes_and_gallery":
        train = configs.load_dataset(configs.parse_config(words)[0]).train
        np.testing.assert_array_equal(plan.call_args.args[1], train.camids)
        assert len(np.unique(train.camids)) > 1
    with Image.open(out) as picture:
        assert picture.size == (2 * columns * (16 + 4), rows * (96 + 4))


@pytest.mark.slow
def test_training_benchmark_prints_its_table(words, tmp_path):
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "scripts.bench_train", *words, "--repeats=2"]
    done = subprocess.run([*command, f"--markdown={table}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for what in ("cold compilation cache", "share of the data path", "peak memory"):
        assert what in done.stdout
    assert table.read_text() == done.stdout


@pytest.mark.slow
def test_training_benchmark_tells_why_the_training_stopped(tmp_path):
    words = ["--config=configs/demo.py", "--config.num_epochs=0"]
    with pytest.raises(UserError, match=r"config\.num_epochs is 0"):
        bench_train.time_to_first_step(tmp_path / "xla", tmp_path / "run", words)


@pytest.mark.slow
def test_both_frameworks_of_the_model_benchmark_compute_the_same(words, torch):
    """The loss of every term from the same weights, so that the same work is timed."""
    words[0] += ":I"  # many vectors and many centers
    config, _ = configs.parse_config(words)
    num_classes = 12
    batch = bench_model.make_batch(config, num_classes)
    network, name_vectors = bench_model.make_torch_mros(config, num_classes)
    parts = recipe.build(config, num_classes, 10)
    variables, own = parts.state.eval_variables, parts.state.params["objective"]
    state = to_torch_state_dict(variables)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    [drawn] = own["center"].values()
    centers = {"center": list(torch.from_numpy(np.array(drawn)))}
    loss = bench_model.make_torch_loss(config, centers, name_vectors)
    out = network.train()(torch.from_numpy(batch["images"]).permute(0, 3, 1, 2))
    theirs = loss(out, torch.from_numpy(batch["labels"]).long())

    @jax.jit
    def ours(images, labels):
        options = {"train": True, "mutable": ["batch_stats"]}
        outputs, _ = parts.network.apply(variables, images, **options)
        return parts.objective(own, outputs, labels)[0]

    assert float(ours(**batch)) == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize(
    "name", sorted({p.stem for p in configs.list_configs()} - {"demo", "mros"})
)
def test_the_other_systems_are_trained_in_pytorch(name, torch):
    config = configs.shrink(configs.read(f"configs/{name}.py").unlock())
    config.input.width = 32
    config = list(configs.split_stages(config).values())[-1]
    system = bench_model.make_parity_system(config, 20)
    batch = bench_model.make_batch(config, 20)
    images = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
    loss, optimizers, finish = system.prepare(system.network, images)
    learned = [x for x in system.network.parameters() if x.requires_grad]
    before = [x.detach().clone() for x in learned]
    total = loss(system.network.train()(images), torch.from_numpy(batch["labels"]).long())
    total.backward()
    finish()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.isfinite(total)
    moved = [not torch.equal(x, y) for x, y in zip(before, learned, strict=True)]
    assert np.mean(moved) > 0.9
    ours: Any = configs.make_network(config, 20)
    init = functools.partial(ours.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), batch["images"][:2])
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == sum(x.numel() for x in learned)


def test_a_variant_that_is_not_in_pytorch(torch):
    config = configs.read("configs/gsrw.py", "k2")
    with pytest.raises(UserError, match=r"no gsrw-k2; --no_torch"):
        bench_model.make_parity_system(config, 20)


def test_a_step_is_taken_each_time(least):
    config, _ = configs.parse_config(least)
    devices = jax.devices()[:1]
    batch = parallel.split(bench_model.make_batch(config, 12), devices)
    step = common.Step(config, 12, None, batch, augment_batch=common.keep_images, devices=devices)
    first, second = step(), step()
    assert float(first["loss"]) != float(second["loss"])


def test_a_network_without_a_pytorch_network(least, capsys):
    assert bench_model.main([*least, "--classes=12", "--repeats=1"]) == 0
    printed = capsys.readouterr()
    assert "tests/parity has no mean: JAX alone" in printed.err
    assert "mean, mean, 96 x 32, batch 8, float32" in printed.out
    assert "PyTorch" not in printed.out


def test_model_benchmark_in_turns():
    """Every framework takes the first turn of every repeat before the next repeat."""
    order: list[str] = []
    steps = {
        name: {what: functools.partial(order.append, name) for what in ("forward", "training step")}
        for name in ("a", "b")
    }
    rows = bench_model.measure(steps, repeats=2, calls=1)
    assert order == 2 * 2 * ["a", "a", "b", "b"]  # the first of each turn is not timed
    assert [(name, what, len(walls)) for name, what, walls, _ in rows] == [
        ("a", "forward", 2),
        ("b", "forward", 2),
        ("a", "training step", 2),
        ("b", "training step", 2),
    ]
    [row] = bench_model.make_rows([("a", "forward", [0.5, 0.25, 1.0], [0.8, 0.4, 1.6])], 8)
    assert row == ("a", "forward", "16.0", "8.0-32.0", "0.100")


def run_small(part, directory):
    """The rows that `bench_gpu --small` writes, and what it prints."""
    command = [sys.executable, "-m", "scripts.bench_gpu", "--small", f"--part={part}"]
    file = directory / "gpu.json"
    done = subprocess.run([*command, f"--json={file}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"], done.stdout


@pytest.mark.slow
def test_gpu_benchmark_of_steps_and_retrieval(tmp_path):
    rows, printed = run_small("retrieval,step", tmp_path)
    assert [row["what"] for row in rows] == [
        "training step, bfloat16",
        *2 * ["training step, float32 (float32 products)"],
        "CMC, mAP, mINP",
        "with ECN",
        "with k-reciprocal",
    ]
    for row in rows[:3]:
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert row["tflops"] > 0
        assert "peak_share" not in row
    for row in rows:
        assert row["seconds"] > 0
        assert 0.1 < row["host_gb"] < 8
        assert f"| {row['part']} | {row['what']} | {row['seconds']:.4g} |" in printed
    assert f"jax {jax.__version__}" in printed


@pytest.mark.slow
def test_gpu_benchmark_of_training(tmp_path):
    rows, _ = run_small("feed,recipe", tmp_path)
    device, host, *recipe = rows
    assert "on the device" in device["remark"]
    assert "in host memory" in host["remark"]
    *parts, whole = recipe
    assert whole["what"] == "all of 1 epochs"
    assert sum(row["seconds"] for row in parts) == pytest.approx(whole["seconds"])
    assert all(row["seconds"] > 0 for row in parts)
    assert "Rank-1" in whole["remark"]


def test_convolutions_are_those_of_the_network():
    config, _ = configs.parse_config(["--config=configs/demo.py"])
    assert config is not None
    found = bench_convolutions.find_convolutions(config, 4)
    size = batches.make_sampler(config.batch.to_dict()).size
    height, width = config.input.height, config.input.width
    counted = count_multiply_adds(configs.make_network(config, 4), height, width)["descriptor"]
    assert sum(n * each.flops for each, n in found.items()) == 2 * size * counted


def test_convolutions_alone_are_timed(monkeypatch, tmp_path):
    """Every pass is run; its time counts as often as the network has the convolution."""
    some = bench_convolutions.Convolution((2, 6, 5, 4), (3, 3, 4, 8), (2, 2), (1, 1), 1)
    other = bench_convolutions.Convolution((2, 6, 4, 4), (1, 1, 4, 3), (1, 1), (0, 0), 1)
    found = {some: 2, other: 1}
    monkeypatch.setattr(bench_convolutions, "find_convolutions", lambda *_, **__: found)

    def measure(work, repeats):
        assert all(np.isfinite(run()).all() for run in work.values())
        return dict.fromkeys(work, 0.25)

    monkeypatch.setattr(bench_convolutions, "measure", measure)
    table = tmp_path / "table.md"
    words = ["--config=configs/demo.py", "--no_torch", "--repeats=1", f"--markdown={table}"]
    assert bench_convolutions.main(words) == 0
    lines = [line.split("|") for line in table.read_text().splitlines()[4:]]
    rows = [[cell.strip() for cell in row[1:6]] for row in lines]
    seconds = {"1 x 1": ("1", "250.0"), "3 x 3 / 2": ("2", "500.0"), "all": ("3", "750.0")}
    assert rows == [
        [kernel, number, "0.00", what, taken]
        for kernel, (number, taken) in seconds.items()
        for what in bench_convolutions.PASSES
    ]


def test_each_is_called_before_it_is_timed():
    order: list[str] = []
    work = {name: functools.partial(order.append, name) for name in ("a", "b")}
    taken = bench_convolutions.measure(work, repeats=2)
    assert order == 2 * ["a", "a", "b", "b"]
    assert all(0 < seconds < 1 for seconds in taken.values())


def test_convolutions_are_the_same_in_both(torch):
    some = bench_convolutions.Convolution((2, 6, 5, 4), (3, 3, 4, 8), (2, 2), (1, 1), 1)
    other = bench_convolutions.Convolution((2, 6, 4, 4), (1, 1, 4, 3), (2, 2), (0, 0), 1)
    for convolution in (some, other):
        ours = bench_convolutions.make_jax_passes(convolution)
        theirs = bench_convolutions.make_torch_passes(convolution)
        orders = ((0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0))
        for what, axes in zip(bench_convolutions.PASSES, orders, strict=True):
            expected = theirs[what]().permute(axes).numpy()
            np.testing.assert_allclose(ours[what](), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gpu_benchmark_of_the_peer(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # it compiles C++ for a minute
    rows, _ = run_small("peer", tmp_path)
    assert sum(row["what"].startswith("JAX") for row in rows) == 2
    assert all("tflops" in row for row in rows if row["what"].startswith("JAX"))
    peers = [row for row in rows if row["what"].startswith("PyTorch")]
    if TORCH:
        assert len(peers) == 2 * len(bench_gpu.LAYOUTS)
        assert all(row["images_per_second"] > 0 for row in peers)
    else:
        assert [row["remark"] for row in peers] == ["PyTorch is not installed (pip install torch)"]


@pytest.mark.slow
def test_gpu_benchmark_counts_the_flops_of_a_step(monkeypatch):
    """Forward, and backward by images and by kernels: each has the network's multiply-adds.

    But for the first convolution, whose images need no gradient. XLA leaves out the padding.
    """
    size = ("--config.input.height=384", "--config.input.width=128")
    monkeypatch.setattr(bench_gpu, "SMALL", (*bench_gpu.SMALL, *size))
    args = argparse.Namespace(small=True)
    config = bench_gpu.make_config(args)
    whole = count_multiply_adds(configs.make_network(config, 12), 384, 128)["descriptor"]
    first = 7 * 7 * 3 * 16 * 192 * 64
    assert bench_gpu.count_flops(args) == pytest.approx(2 * 8 * (3 * whole - first), rel=0.05)


class Process:
    """What the processes of `bench_gpu` would answer on a machine with an H100."""

    answers: ClassVar[dict[str, Any]] = {}

    def __init__(self, words):
        self.words = list(words)

    def add(self, word):
        self.words.append(word)

    def __call__(self, name, environment):
        answers = {
            "device": {"platform": "gpu", "kind": KIND, "products": "TF32", "text": KIND},
            "flops": 5e12,
            "torch": "cuda",
        }
        cells = {"seconds": 0.02, "images_per_second": 6400.0, "range": [6000.0, 6500.0]}
        case = None if name in answers else bench_gpu.list_cases()[int(name)]
        if name != "device":
            assert "--platform=gpu" in self.words
        if name == "flops" or name == "torch" or (case and case.what.startswith("PyTorch")):
            assert environment == {"JAX_PLATFORMS": "cpu"}  # it leaves the GPU alone
        else:
            assert environment == {}
        return self.answers.get(name, {"found": answers.get(name, [cells])})


KIND = "NVIDIA H100 80GB HBM3"


def test_gpu_benchmark_on_a_gpu(monkeypatch, tmp_path, capsys):
    """One measurement fails, says why, and the others go on."""
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(Process, "answers", {"1": {"failed": "RESOURCE_EXHAUSTED"}})
    monkeypatch.setattr(bench_gpu, "Runner", Process)
    assert bench_gpu.main([f"--json={file}"]) == 1
    written = json.loads(file.read_text())
    assert written["device"]["kind"] == KIND
    rows = written["rows"]
    assert sorted({row["part"] for row in rows}) == sorted(bench_gpu.PARTS)
    assert len(rows) == len(bench_gpu.list_cases())
    fast, failed, exact = rows[:3]
    assert failed["what"] == "training step, float32 (TF32 products)"
    assert failed["remark"] == "RESOURCE_EXHAUSTED"
    assert exact["what"] == "training step, float32 (float32 products)"
    assert fast["tflops"] == exact["tflops"] == pytest.approx(250)
    assert fast["peak_share"] == pytest.approx(250 / 989.4)
    assert exact["peak_share"] == pytest.approx(250 / 66.9)
    printed = capsys.readouterr().out
    assert "| 0.02 | 6,400 | 6,000-6,500 | 250 | 25.3 | - | - |  |" in printed
    assert printed.count("| RESOURCE_EXHAUSTED |") == 1


def test_gpu_benchmark_of_another_gpu_without_pytorch(monkeypatch, tmp_path):
    device = {"platform": "gpu", "kind": "another", "products": "TF32", "text": ""}
    answers = {"device": {"found": device}, "torch": {"failed": "PyTorch is not installed"}}
    monkeypatch.setattr(Process, "answers", answers)
    monkeypatch.setattr(bench_gpu, "Runner", Process)
    shares = []
    for option in ([], ["--peak_tflops=1000,500"]):
        file = tmp_path / "gpu.json"
        assert bench_gpu.main(["--part=peer", f"--json={file}", *option]) == 0
        rows = json.loads(file.read_text())["rows"]
        assert [row["what"] for row in rows] == [
            "PyTorch",
            "JAX, bfloat16",
            "JAX, float32 (TF32 products)",
        ]
        assert rows[0]["remark"] == "PyTorch is not installed"
        shares.append([row.get("peak_share") for row in rows])
    assert shares == [[None, None, None], [None, pytest.approx(0.25), pytest.approx(0.5)]]


def test_gpu_benchmark_in_full_size_needs_a_gpu(monkeypatch, capsys):
    device = {"platform": "cpu", "kind": "cpu", "products": "float32", "text": ""}
    monkeypatch.setattr(Process, "answers", {"device": {"found": device}})
    monkeypatch.setattr(bench_gpu, "Runner", Process)
    assert console.run(bench_gpu.main, ["--part=step"]) == console.MISUSE
    assert "no accelerator here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_gpu.main(["--peak_tflops=1,2,3,4"])


def test_gpu_benchmark_tells_why_a_process_failed(monkeypatch, capsys):
    """It was killed; or JAX or what a user can mend raised an error."""
    started = []

    def kill(command, env, **options):
        started.append((command, env["CUDA_VISIBLE_DEVICES"], env["JAX_PLATFORMS"]))
        return subprocess.CompletedProcess(command, -9, stdout="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", kill)
        answer = bench_gpu.Runner(["--small"])("flops", bench_gpu.ON_CPU)
    assert answer == {"failed": "its process ended with -9"}
    [(command, visible, platform)] = started
    assert command[1:] == ["-m", "scripts.bench_gpu", "--small", "--child=flops"]
    assert (visible, platform) == ("2", "cpu")
    for error, why in (
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a table"), "RESOURCE_EXHAUSTED: o"),
        (UserError("the training stopped:\nmessages\nerror: no room"), "error: no room"),
    ):
        monkeypatch.setitem(bench_gpu.PROBES, "flops", lambda args, error=error: raise_it(error))
        assert bench_gpu.main(["--child=flops"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["failed"].startswith(why)
        assert str(error) in printed.err


def raise_it(error):
    raise error


def test_gpu_benchmark_itself_leaves_the_gpu_alone():
    """JAX would take most of its memory. Where it has no such platform, it must not be started."""
    code = "from scripts import bench_gpu; bench_gpu.list_cases(); print('through')"
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    for more, through in (("", True), ("; bench_gpu.jax.devices()", False)):
        command = [sys.executable, "-c", code.replace("; print", f"{more}; print")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ("through" in done.stdout) == through, done.stderr


def test_pytorch_without_the_device_that_jax_has(monkeypatch, torch):
    assert bench_model.find_torch_device("cpu") == "cpu"
    for platform, sees, expected in (
        ("gpu", True, "cuda"),
        ("gpu", False, UserError),
        ("tpu", True, UserError),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees)
        if expected is UserError:
            with pytest.raises(UserError, match=f"does not see JAX's {platform}"):
                bench_model.find_torch_device(platform)
        else:
            assert bench_model.find_torch_device(platform) == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="PyTorch is not installed"):
        bench_model.find_torch_device("cpu")


def test_memory_of_a_device_that_tells_it(monkeypatch):
    for told, expected in (({"peak_bytes_in_use": 3e9}, {"device_gb": 3.0}), (None, {}), ({}, {})):
        device = types.SimpleNamespace(memory_stats=lambda told=told: told)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        cells = bench_gpu.measure_memory()
        assert cells.pop("host_gb") > 0.1
        assert cells == expected


@pytest.mark.parametrize(
    ("device", "products"),
    [
        ({"platform": "cpu"}, "float32"),
        ({"platform": "tpu"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "9.0"}, "TF32"),
        ({"platform": "gpu", "compute_capability": "12.0"}, "TF32"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "float32"),
        ({"platform": "gpu", "compute_capability": "gfx942"}, "float32"),
    ],
)
def test_how_devices_make_products_of_float32(device, products):
    assert bench_gpu.name_products(types.SimpleNamespace(**device)) == products


def test_rounds_are_waited_for_at_their_end():
    log = []
    clock = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: float(next(clock)))
        cells = bench_gpu.time_rounds(
            lambda: log.append("start"),
            lambda _: log.append("wait"),
            images=8,
            args=argparse.Namespace(steps=2, repeats=3),
        )
    assert log == ["start", "wait", *4 * ["start", "start", "wait"]]
    assert cells["seconds"] == 0.5
    assert cells["images_per_second"] == 16

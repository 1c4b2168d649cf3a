"""The scripts: by their `main`, and in a process of their own where they start others."""

import csv
import dataclasses
import functools
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.errors import UserError
from mros_jax.models.torch_weights import to_torch_state_dict
from mros_jax.training import recipe
from mros_jax.training.feed import Feed
from scripts import ablation, bench_model, bench_train, common, plot_schedule, show_batch
from tests.least import write_config
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
def words(tmp_path):
    return [*WORDS, f"--config.dataset.cache_dir={tmp_path / 'cache'}"]


@pytest.fixture
def least(tmp_path, monkeypatch):
    return write_config(tmp_path, monkeypatch)


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


@pytest.mark.parametrize("sampler", ["identities", "shuffled"])
def test_show_batch_of_any_sampler(sampler, tmp_path, monkeypatch):
    config = tmp_path / "config.py"
    sizes = {"identities": {"identities": 2, "images": 2}, "shuffled": {"size": 3}}
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
    assert show_batch.main([*words, f"--out={out}"]) == 0
    rows, columns = {"identities": (2, 2), "shuffled": (3, 1)}[sampler]
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


def test_a_step_is_taken_each_time(least):
    config, _ = configs.parse_config(least)
    devices = jax.devices()[:1]
    batch = parallel.split(bench_model.make_batch(config, 12), devices)
    step = common.make_step(
        config, 12, None, batch, augment_batch=common.keep_images, devices=devices
    )
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
    assert order == 2 * ["a", "b", "a", "b", "a", "b"]  # the first of each compiles
    assert [(name, what, len(walls)) for name, what, walls, _ in rows] == [
        ("a", "forward", 2),
        ("b", "forward", 2),
        ("a", "training step", 2),
        ("b", "training step", 2),
    ]
    [row] = bench_model.make_rows([("a", "forward", [0.5, 0.25, 1.0], [0.8, 0.4, 1.6])], 8)
    assert row == ("a", "forward", "16.0", "8.0-32.0", "0.100")

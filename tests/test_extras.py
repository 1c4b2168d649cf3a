"""Without the packages of an extra, its purpose alone is missed, and says what to install."""

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from mros_jax import console, explore, extras, report, train
from mros_jax.data import prepare
from mros_jax.data.own.pictures import read_video
from mros_jax.errors import UserError
from mros_jax.export.build import export
from mros_jax.gallery import Index
from mros_jax.retrieval.neighbors import search_faiss
from tests.training import ROOT, TINY, make_config


@pytest.fixture
def bare(monkeypatch):
    """An installation without extras: nothing of theirs is found or imported."""
    hidden = {module for modules in extras._MODULES.values() for module in modules}
    find_spec = importlib.util.find_spec

    def find(name, package=None):
        return None if name.partition(".")[0] in hidden else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for name in list(sys.modules):
        if name.partition(".")[0] in hidden or name == "mros_jax.data.datasets.prepared":
            monkeypatch.delitem(sys.modules, name)
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an ImportError


@pytest.mark.slow
@pytest.mark.usefixtures("bare")
def test_training_needs_no_extra(tmp_path, cache_dir, caplog):
    config = make_config(cache_dir, num_epochs=1, report=True)
    with caplog.at_level(logging.INFO):
        results = train.train(config, tmp_path / "run")
    assert results is not None
    assert results["results"]
    assert (
        "The report at the end needs jinja2 and matplotlib, which are not installed" in caplog.text
    )
    assert f"python -m mros_jax.report {tmp_path / 'run'}" in caplog.text
    assert "A TensorBoard log needs tensorboardX, which is not installed" in caplog.text
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "metrics.jsonl" in files
    assert not files & {"report.html", "tensorboard"}


@pytest.mark.usefixtures("bare")
def test_each_purpose_says_what_to_install(tmp_path, capsys):
    with pytest.raises(UserError, match=r"a report needs .* pip install 'mros_jax\[report\]'"):
        report.write_report(tmp_path)
    with pytest.raises(UserError, match=r"needs gradio and jinja2, .*'mros_jax\[explore\]'"):
        explore.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"needs faiss, .* pip install 'mros_jax\[faiss\]'"):
        search_faiss(np.eye(4, dtype=np.float32), 2)
    with pytest.raises(UserError, match=r"an index needs faiss, .* 'mros_jax\[faiss\]'"):
        Index(tmp_path)
    with pytest.raises(UserError, match=r"a video needs av, .* pip install 'mros_jax\[video\]'"):
        next(read_video(tmp_path / "yard.mp4"))
    for form, extra in (("onnx", "export"), ("stablehlo", "stablehlo")):
        with pytest.raises(UserError, match=rf"file needs .* pip install 'mros_jax\[{extra}\]'"):
            export(tmp_path, form)
    words = ["--dataset=market1501", f"--root={tmp_path}", f"--out={tmp_path}"]
    assert console.run(prepare.main, words) == console.MISUSE
    assert "pip install 'mros_jax[tfds]'" in capsys.readouterr().err


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for extra, modules in extras._MODULES.items():
        assert len(optional[extra]) == len(modules)
    in_all = [extra for extra in extras._MODULES if extra not in ("explore", "export")]
    (everything,) = optional["all"]
    assert everything == f"mros_jax[{','.join(in_all)}]"
    assert "mros_jax[test,explore]" in optional["test-all"]
    for extra in in_all:
        assert all(importlib.util.find_spec(module) for module in extras._MODULES[extra])


@pytest.mark.slow
def test_wheel_works_from_any_directory(tmp_path):
    """Built, unpacked, and run where there is no clone: its configs and tables are inside."""

    def run(*words, **more):
        command = [sys.executable, *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, **more)
        assert result.returncode == 0, result.stderr
        return result.stdout

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("mros_jax-*.whl")
    run(*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel)
    place = {"env": {"PATH": "/usr/bin:/bin", "HOME": tmp_path, "PYTHONPATH": tmp_path / "site"}}
    where = run("-c", "import mros_jax; print(mros_jax.__file__)", **place)
    assert where.startswith(str(tmp_path / "site"))
    words = [f"--config.{name}={value}" for name, value in {**TINY, "num_epochs": 1}.items()]
    train = ["-m", "mros_jax.train", "--workdir=run", *words]
    run(*train, "--config=configs/demo.py:III", "--config.report=True", **place)
    assert (elsewhere / "run" / "report.html").is_file()
    assert "mAP" in run("-m", "mros_jax.compare", "run", **place)
    assert "resnet50_v1" in run("-m", "mros_jax.fetch_weights", "--list", **place)


def test_jax_has_the_extras_that_ours_ask_for():
    """Where it does not, pip warns and installs JAX for a CPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {name: project["optional-dependencies"][name] for name in ("cuda", "tpu")}
    assert asked == {name: [f"jax[{name}]"] for name in asked}
    assert set(asked) <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra") or ())

"""ONNX files of every system, as onnxruntime runs them. `make test-export` has what they need."""

import json
import re
from typing import Any

import numpy as np
import pytest

from mros_jax.config import read, shrink
from mros_jax.data import augment
from mros_jax.data.resample import INTERPOLATIONS
from mros_jax.errors import UserError
from mros_jax.export import build, checks
from mros_jax.export.model import load
from mros_jax.files import read_json, write_json
from tests.runs import begin_run
from tests.training import ROOT

WHY = "needs the extra export, which `make test-export` installs"
onnx = pytest.importorskip("onnx", reason=WHY)
pytest.importorskip("onnxruntime", reason=WHY)
pytest.importorskip("jax2onnx", reason=WHY)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

SYSTEMS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "demo")


@pytest.fixture(scope="module")
def make(tmp_path_factory, cache_dir):
    """`make(system)`: a run with random weights of the system's smallest network."""
    directory = tmp_path_factory.mktemp("runs")

    def make_one(name):
        path = directory / name
        if not path.exists():
            config = shrink(read(ROOT / "configs" / f"{name}.py").unlock())
            config.dataset.preset = "small"
            config.dataset.cache_dir = str(cache_dir)
            begin_run(path, config.lock())
        return path

    return make_one


def read_metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(make, system, tmp_path):
    """The export itself compares descriptors and lists, and writes nothing where they differ."""
    from mros_jax.export import onnx_file

    run = make(system)
    out = build.export(run, "onnx", tmp_path / "m.onnx", sample=5)
    session = onnx_file.Session(out.read_bytes())
    model = load(run)
    for count, height, width in ((2, 33, 97), (3, 128, 64)):
        shape = (count, height, width, 3)
        images = np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)
        ours, theirs = model.embed(list(images)), session(images)
        assert checks.compare(ours, theirs, 1, model.config.eval.metric).difference <= 1e-4
    metadata = read_metadata(out)
    assert metadata["system"] == model.run.system
    assert metadata["precision"] == "float32"
    assert json.loads(metadata["check"])["difference"] <= 1e-4
    assert json.loads(metadata["descriptor"])["normalized"] is model.config.eval.normalize


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_images_are_resized_as_pil_does(make, interpolation, tmp_path):
    """All grey levels are the same, whatever the size."""
    import onnxruntime

    from mros_jax.export import onnx_file

    run = make("strong")
    model = load(run)
    model.config.input.interpolation = interpolation
    height, width = model.size
    before = onnx_file.write_before(model)
    session = onnxruntime.InferenceSession(before.SerializeToString())
    for size in ((1, 1), (7, 200), (128, 64), (96, 48), (701, 333)):
        images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
        [made] = session.run(None, {"images": images})
        expected = augment.preprocess(
            images, height=height, width=width, interpolation=interpolation
        )
        np.testing.assert_allclose(made.transpose(0, 2, 3, 1), expected, atol=1e-6)


def test_other_pixels_than_imagenets(make):
    import onnxruntime

    from mros_jax.export import onnx_file

    pixels: dict[str, Any] = {
        "mean": (0.4, 0.45, 0.5),
        "std": (1 / 255, 0.5, 0.25),
        "channels": "bgr",
    }
    model = load(make("strong"))
    model.config.input.update(pixels)
    height, width = model.size
    session = onnxruntime.InferenceSession(onnx_file.write_before(model).SerializeToString())
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 24, 3), dtype=np.uint8)
    [made] = session.run(None, {"images": images})
    expected = augment.preprocess(images, height=height, width=width, **pixels)
    np.testing.assert_allclose(made.transpose(0, 2, 3, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_smaller_precisions_say_what_they_lose(make, precision, tmp_path, caplog):
    run = make("strong")
    with caplog.at_level("INFO"):
        out = build.export(run, "onnx", tmp_path / "m.onnx", precision=precision, sample=30)
    told = re.search(rf"mAP of float32 (\S+), of {precision} (\S+): it loses", caplog.text)
    assert told
    scores = json.loads(read_metadata(out)["check"])["mAP"]
    assert told[2] == f"{100 * scores[precision]:.2f}"
    assert read_metadata(out)["precision"] == precision
    assert abs(scores["float32"] - scores[precision]) < 0.2
    model = onnx.load(out)
    kinds = {weight.data_type for weight in model.graph.initializer if len(weight.dims) == 4}
    assert getattr(onnx.TensorProto, precision.upper()) in kinds


def test_int8_needs_training_images(make, tmp_path):
    run = make("strong")
    config = read_json(run / "config.json")
    moved = {**config, "dataset": {**config["dataset"], "name": "folder", "root": "/nowhere"}}
    write_json(run / "config.json", moved)
    try:
        with pytest.raises(UserError, match="takes the ranges of activations from training images"):
            build.export(run, "onnx", tmp_path / "m.onnx", precision="int8", sample=5)
    finally:
        write_json(run / "config.json", config)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_agree_is_not_written(make, tmp_path, monkeypatch):
    from mros_jax.export import onnx_file

    right = onnx_file.Session.__call__
    monkeypatch.setattr(onnx_file.Session, "__call__", lambda self, x: -right(self, x))
    with pytest.raises(UserError, match=r"differ by up to 2\.0e\+00 of their norm"):
        build.export(make("strong"), "onnx", tmp_path / "m.onnx", sample=5)
    assert list(tmp_path.iterdir()) == []

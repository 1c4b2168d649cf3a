"""What is exported agrees with the run, or is not written; StableHLO files as JAX alone reads them.

ONNX files: `test_onnx.py`.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.export
import numpy as np
import pytest
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.errors import NotFoundError, UserError
from mros_jax.export import __main__ as command
from mros_jax.export import build, checks, stablehlo
from mros_jax.export.model import flatten, load
from mros_jax.files import read_json, write_json
from mros_jax.models.layers import max_pool, plainly
from tests.runs import copy_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

# What a program of somebody else's does with a file. It has JAX alone.
ELSEWHERE = """
import json, sys, zipfile
for name in ("mros_jax", "flax", "PIL", "ml_collections", "orbax"):
    sys.modules[name] = None
import jax, jax.export, numpy as np

with zipfile.ZipFile(sys.argv[1]) as file:
    model = jax.export.deserialize(bytearray(file.read("model.stablehlo")))
    metadata = json.loads(file.read("metadata.json"))
np.save(sys.argv[3], model.call(np.load(sys.argv[2])))
print(metadata["system"])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    return copy_run(tmp_path_factory.mktemp("export") / "run", cache_dir)


@pytest.fixture(scope="module")
def model(run):
    return load(run)


@pytest.fixture(scope="module")
def file(run):
    """A StableHLO file."""
    return build.export(run, "stablehlo", sample=10)


def make_images(*shapes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def assert_near(theirs, ours):
    scale = np.linalg.norm(ours, axis=1)
    assert np.max(np.linalg.norm(theirs - ours, axis=1) / scale) <= checks.TOLERANCE


def test_a_file_describes_images_of_any_size_as_the_run_does(file, model):
    assert file == model.run.path / "model.stablehlo.zip"
    with zipfile.ZipFile(file) as archive:
        program = jax.export.deserialize(bytearray(archive.read(stablehlo.PROGRAM)))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    images = make_images((41, 23), (41, 23), (150, 70))
    theirs = checks.run(jax.jit(program.call), images)
    ours = model.embedder.embed(images)
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    assert theirs.dtype == np.float32
    assert_near(theirs, ours)


def test_a_file_says_what_it_is(file, model):
    with zipfile.ZipFile(file) as archive:
        metadata = json.loads(archive.read(stablehlo.METADATA))
    config = model.config
    assert metadata["system"] == model.run.system
    assert metadata["checkpoint"] == model.embedder.checkpoint_id
    assert metadata["input"]["resized_to"] == [config.input.height, config.input.width]
    assert metadata["input"]["mean"] == [0.485, 0.456, 0.406]
    assert metadata["descriptor"]["normalized"]
    sizes = [part["size"] for part in metadata["descriptor"]["parts"]]
    assert sum(sizes) == metadata["descriptor"]["size"]
    [plain, ecn] = metadata["scores"]
    assert plain["mAP"] == model.run.rankings[0]["mAP"]
    assert ecn["rerank"] == "ecn"
    assert plain["protocol"]["num_query"] == len(model.run.rankings[0]["query_pids"])
    assert metadata["licence"]["code"] == "Apache-2.0"
    assert metadata["library"].startswith("mros_jax ")
    assert metadata["check"]["difference"] <= checks.TOLERANCE
    assert "2 queries and 8 gallery images of synthetic" in metadata["check"]["on"]
    assert json.loads(flatten(metadata)["descriptor"]) == metadata["descriptor"]


@pytest.mark.slow
def test_jax_alone_reads_a_file(file, model, tmp_path):
    images = make_images((64, 31), (64, 31))
    np.save(tmp_path / "images.npy", np.stack(images))
    out = tmp_path / "made.npy"
    words = [sys.executable, "-c", ELSEWHERE, file, tmp_path / "images.npy", out]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.run.system
    assert_near(np.load(out), model.embed(images))


@pytest.mark.parametrize("how", [{"flip_test": True}, {"crops": "ten"}])
def test_means_over_views_are_those_of_the_run(run, tmp_path, how):
    shutil.copytree(run, tmp_path / "run")
    config = read_json(run / "config.json")
    size = [108, 36] if "crops" in how else [96, 32]
    config["eval"]["resize"] = size
    write_json(tmp_path / "run" / "config.json", config)
    view = load(tmp_path / "run", **how)
    explained = view.explain()
    assert explained["input"]["resized_to"] == size
    assert explained["input"] | how == explained["input"]
    assert explained["scores"] == []  # they are of whole images
    images = make_images((50, 20), (50, 20))
    assert_near(np.asarray(jax.jit(view.__call__)(np.stack(images))), view.embed(images))


def test_a_file_that_does_not_agree_is_not_written(run, model, tmp_path, monkeypatch, capsys):
    make = stablehlo.Session.__call__
    monkeypatch.setattr(stablehlo.Session, "__call__", lambda self, x: 1.001 * make(self, x))
    out = tmp_path / "m.stablehlo.zip"
    words = [str(run), "--format=stablehlo", f"--out={out}", "--sample=10"]
    assert console.run(command.main, words) == console.MISUSE
    message = capsys.readouterr().err
    assert "nothing is written" in message
    assert "descriptors differ by up to 1.0e-03 of their norm" in message
    assert list(tmp_path.iterdir()) == []


def test_without_the_data_set_a_file_is_checked_on_noise(run, tmp_path, caplog):
    config = read_json(run / "config.json")
    moved = {**config, "dataset": {**config["dataset"], "name": "folder", "root": "/nowhere"}}
    write_json(run / "config.json", moved)
    try:
        out = build.export(run, "stablehlo", tmp_path / "m.stablehlo.zip", sample=6)
        with zipfile.ZipFile(out) as archive:
            metadata = json.loads(archive.read(stablehlo.METADATA))
        assert metadata["check"]["on"] == "1 queries and 5 gallery images of noise"
        with pytest.raises(NotFoundError, match="/elsewhere"):
            build.export(run, "stablehlo", tmp_path / "n.stablehlo.zip", root="/elsewhere")
    finally:
        write_json(run / "config.json", config)
    assert [path.name for path in tmp_path.iterdir()] == ["m.stablehlo.zip"]


def test_options_that_make_no_file(run, tmp_path):
    with pytest.raises(UserError, match="format is 'onxx'; expected one of onnx, stablehlo, torch"):
        build.export(run, "onxx")
    with pytest.raises(UserError, match="precision is 'int4'"):
        build.export(run, "onnx", precision="int4")
    with pytest.raises(UserError, match="precision int8 is for ONNX files; torch files have"):
        build.export(run, "torch", precision="int8")
    with pytest.raises(UserError, match="sample is 1; a query and a gallery image"):
        build.export(run, "stablehlo", sample=1)
    with pytest.raises(UserError, match=r"w\.pth must end in \.safetensors"):
        build.export(run, "torch", tmp_path / "w.pth")
    with pytest.raises(UserError, match="is no directory; make it first"):
        build.export(run, "torch", tmp_path / "no" / "w.safetensors")
    with pytest.raises(NotFoundError, match="not a run"):
        build.export(tmp_path, "torch")
    assert list(tmp_path.iterdir()) == []


def test_a_pytorch_file_needs_no_data_set(run, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    assert command.main([str(run), "--format=torch", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out


def test_agreement():
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((12, 8)).astype(np.float32)
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    assert checks.compare(ours, ours, 2, "cosine") == checks.Agreement(0.0, 0, 2)
    near = checks.compare(ours, ours + np.float32(1e-6), 2, "cosine")
    assert near.holds
    assert 0 < near.difference < 1e-5
    far = ours.copy()
    far[5, 0] += 2e-4
    assert not checks.compare(ours, far, 2, "euclidean").holds
    swapped = ours.copy()
    swapped[[4, 7]] = ours[[7, 4]]
    found = checks.compare(ours, swapped, 2, "cosine")
    assert found.moved == 2
    assert not found.holds
    # Two images that are equally far, up to rounding, may change places.
    ours[4] = ours[7]
    turned = ours.copy()
    turned[4] *= np.float32(1 + 1e-6)
    assert checks.compare(ours, turned, 2, "cosine").moved == 0
    far[3] = np.nan
    assert not checks.compare(ours, far, 2, "cosine").holds


def test_the_same_scores_from_the_same_descriptors(model):
    dataset = configs.load_dataset(model.config)
    everything = checks.draw(dataset, 10_000)
    assert len(everything.query) == len(dataset.query)
    assert len(everything.gallery) == len(dataset.gallery)
    result = checks.score(model.embed(everything.images), everything, model.config.eval)
    assert result is not None
    assert result.mAP == pytest.approx(model.run.rankings[0]["mAP"], abs=1e-6)
    few = checks.draw(dataset, 20)
    assert (len(few.query), len(few.gallery)) == (4, 16)
    assert few.labels is not None
    pids, mates, query_cameras, cameras = few.labels
    assert set(pids) <= set(mates)
    alone = dataclasses.replace(few, labels=(pids, -mates, query_cameras, cameras))
    assert checks.score(model.embed(few.images), alone, model.config.eval) is None


def test_invented_images_are_of_many_sizes():
    sample = checks.invent(20)
    assert (len(sample.query), len(sample.gallery)) == (4, 16)
    assert len({image.shape for image in sample.images}) == 20
    assert checks.score(np.ones((20, 2), np.float32), sample, ConfigDict()) is None
    resized = sample.resize(32, 16, "bilinear")
    assert {image.shape for image in resized.images[1:]} == {(32, 16, 3)}
    assert resized.images[0].shape == sample.images[0].shape


def test_programs_for_other_compilers_do_not_ask_for_the_platform():
    def pool(x):
        return max_pool(x)

    images = np.random.default_rng(0).standard_normal((1, 6, 6, 2)).astype(np.float32)
    assert "platform_index" in str(jax.make_jaxpr(pool)(images))
    with plainly():
        plain = jax.make_jaxpr(lambda x: max_pool(x))(images)
    assert "platform_index" not in str(plain)
    assert "platform_index" in str(jax.make_jaxpr(lambda x: max_pool(x))(images))

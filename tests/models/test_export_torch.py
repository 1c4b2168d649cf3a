"""The export script on a run, and its output in the PyTorch model of the parity tests."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mros_jax import console
from tests.runs import make_run

ROOT = pathlib.Path(__file__).parents[2]


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export_torch = load_module(ROOT / "scripts" / "export_torch.py")


def test_a_run_computes_the_same_in_pytorch(tmp_path, capsys):
    run = make_run(tmp_path / "run", tmp_path / "cache")
    out = tmp_path / "mros.safetensors"
    assert export_torch.main([f"--run={run}", f"--out={out}"]) == 0
    assert "tensors" in capsys.readouterr().out

    embedder = export_torch.load_model(run)
    model, config = embedder.model, embedder.config
    torch_mros = load_module(ROOT / "tests" / "parity" / "torch_mros.py")
    theirs = torch_mros.TorchMROS(
        model.num_classes, model.setting, model.backbone, last_stride=model.last_stride
    )
    theirs.load_state_dict(load_file(out), strict=True)
    shape = (2, config.input.height, config.input.width, 3)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False).descriptor)
    ours = apply(embedder.variables, images)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))["descriptor"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_run(tmp_path, capsys):
    arguments = [f"--run={tmp_path}", f"--out={tmp_path / 'w.safetensors'}"]
    assert console.run(export_torch.main, arguments) == 2
    assert "not a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_torch.main([f"--run={tmp_path}", f"--out={tmp_path / 'w.pth'}"])
    assert "must end in .safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

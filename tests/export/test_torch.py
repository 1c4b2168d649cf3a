"""The PyTorch form of a run, in the PyTorch model of the parity tests."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors

from mros_jax.export import __main__ as export
from mros_jax.inference import load_model
from mros_jax.systems.mros import MROS
from tests.runs import make_run


@pytest.mark.slow
def test_a_run_computes_the_same_in_pytorch(tmp_path, cache_dir, torch):
    from safetensors.torch import load_file

    from tests.parity.torch_mros import TorchMROS

    run = make_run(tmp_path / "run", cache_dir)
    out = tmp_path / "mros.safetensors"
    assert export.main([str(run), "--format=torch", f"--out={out}"]) == 0

    embedder = load_model(run)
    network, config = embedder.network, embedder.config
    assert isinstance(network, MROS)
    assert config is not None
    theirs = TorchMROS(network.num_classes, "IV", network.trunk, last_stride=network.last_stride)
    theirs.load_state_dict(load_file(out), strict=True)
    shape = (2, config.input.height, config.input.width, 3)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    apply = jax.jit(functools.partial(network.apply, train=False))
    ours = apply(embedder.variables, images).descriptor
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))["descriptor"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    with safetensors.safe_open(out, "np") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["checkpoint"] == embedder.checkpoint_id
    assert json.loads(header["descriptor"])["size"] == ours.shape[1]

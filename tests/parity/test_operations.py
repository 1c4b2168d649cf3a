"""Each operation of a searched cell against PyTorch: result, statistics, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mros_jax.models import torch_weights
from mros_jax.models.operations import OPERATIONS
from tests.parity.common import difference
from tests.parity.harness import randomise, to_numpy
from tests.parity.torch_auto_reid import make_operation


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_operation(kind, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9, 5, 7))  # an odd number of channels, too
    theirs = randomise(make_operation(kind, 7, stride)).double().train()
    state = {name: to_numpy(value).copy() for name, value in theirs.state_dict().items()}
    theirs_x = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    expected = theirs(theirs_x)
    weight = rng.standard_normal(expected.shape)
    (expected * torch.from_numpy(weight)).sum().backward()

    with jax.enable_x64(True):
        operation = OPERATIONS[kind](features=7, stride=stride, dtype=np.float64)
        init = functools.partial(operation.init, train=False)
        shapes = {"params": {}, **jax.eval_shape(init, jax.random.key(0), x)}
        variables = {"params": {}, **torch_weights.from_torch_state_dict(state, shapes)}
        variables = jax.tree.map(lambda v: v.astype(np.float64), variables)

        @jax.jit
        def run(params, x):
            def apply(params, x):
                own = {**variables, "params": params}
                return operation.apply(own, x, train=True, mutable=["batch_stats"])

            y, pull, stats = jax.vjp(apply, params, x, has_aux=True)
            return y, stats, pull(jnp.asarray(weight.transpose(0, 2, 3, 1)))

        y, stats, (gradients, dx) = run(variables["params"], jnp.asarray(x))
    assert y.shape == (3, -(-9 // stride), -(-5 // stride), 7)
    assert difference(y.transpose(0, 3, 1, 2), to_numpy(expected), 1) <= 1e-9
    assert difference(dx.transpose(0, 3, 1, 2), to_numpy(theirs_x.grad), 1) <= 1e-9
    named = torch_weights.to_torch_state_dict({"params": gradients, **stats})
    for name, parameter in theirs.named_parameters():
        assert difference(named[name], to_numpy(parameter.grad), 1) <= 1e-9, name
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            assert difference(named[name], to_numpy(buffer)) <= 1e-9, name

"""Inception blocks; a whole network of them is compared with PyTorch in tests/parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.models.inception import ConvUnit, Inception, average_pool

X = np.random.default_rng(0).normal(size=(6, 7, 5, 8)).astype(np.float32)


def test_average_counts_the_zeros_outside(recorded):
    def compute():
        import torch

        pool = torch.nn.AvgPool2d(3, stride=1, padding=1)
        pooled = pool(torch.from_numpy(X).permute(0, 3, 1, 2))
        return {"pooled": pooled.permute(0, 2, 3, 1)}

    expected = recorded(compute)["pooled"]
    np.testing.assert_allclose(jax.jit(average_pool)(X), expected, atol=1e-6)


def test_groups_are_batches_one_after_the_other():
    block = ConvUnit(4, 3)
    variables = jax.jit(functools.partial(block.init, train=False))(jax.random.key(0), X)

    @functools.partial(jax.jit, static_argnames="groups")
    def apply(variables, x, groups=1):
        y, updated = block.apply(variables, x, train=True, groups=groups, mutable=["batch_stats"])
        return y, {**variables, **updated}

    together, after = apply(variables, X, groups=3)
    for i in range(3):
        alone, variables = apply(variables, X[2 * i : 2 * i + 2])
        np.testing.assert_allclose(together[2 * i : 2 * i + 2], alone, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, variables)


def test_starts_as_pytorchs_layers_do():
    init = jax.jit(functools.partial(ConvUnit(64, 3).init, train=False))
    kernel = np.asarray(init(jax.random.key(0), X)["params"]["conv"]["kernel"])
    limit = (3 * 3 * 8) ** -0.5
    np.testing.assert_allclose([kernel.min(), kernel.max()], [-limit, limit], rtol=0.01)


def test_channels_that_cannot_be_shared_out():
    with pytest.raises(UserError, match="6 channels; expected a multiple of 4"):
        Inception(6).init(jax.random.key(0), jnp.asarray(X), train=False)

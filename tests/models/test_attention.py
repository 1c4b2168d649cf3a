"""Attention over channels by hand, and what it starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.models.attention import SqueezeExcitation
from tests.recorded import draw


def test_weights_by_hand():
    shapes = {"squeeze": (8, 2), "excite": (2, 8)}
    params = {
        name: {
            "kernel": draw(f"{name}/kernel", shape).astype(np.float32),
            "bias": draw(f"{name}/bias", shape[1:]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 8)).astype(np.float32)
    found = jax.jit(SqueezeExcitation(ratio=4).apply)({"params": params}, x)
    for image, ours in zip(x, np.asarray(found), strict=True):
        y = image.reshape(-1, 8).mean(0)
        y = np.maximum(params["squeeze"]["kernel"].T @ y + params["squeeze"]["bias"], 0)
        y = params["excite"]["kernel"].T @ y + params["excite"]["bias"]
        np.testing.assert_allclose(ours, image / (1 + np.exp(-y)), rtol=1e-5, atol=1e-6)


def test_starts_as_pytorchs_linear_layers_do():
    init = jax.jit(SqueezeExcitation(ratio=8).init)
    x = np.zeros((1, 1, 1, 1024), np.float32)
    params = jax.device_get(init(jax.random.key(0), x)["params"])
    for name, inputs in (("squeeze", 1024), ("excite", 128)):
        for leaf in params[name].values():
            ends = np.array([leaf.min(), leaf.max()]) * inputs**0.5
            np.testing.assert_allclose(ends, [-1, 1], atol=0.05)
            assert np.abs(ends).max() <= 1 + 1e-6
            np.testing.assert_allclose(leaf.std() * inputs**0.5, 3**-0.5, rtol=0.1)


@pytest.mark.parametrize("ratio", [0, 3, 16])
def test_ratios_that_do_not_divide_the_channels(ratio):
    with pytest.raises(UserError, match=f"ratio is {ratio}; it must divide 8 channels"):
        SqueezeExcitation(ratio).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))

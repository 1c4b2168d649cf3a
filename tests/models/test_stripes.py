from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mros_jax.errors import UserError
from mros_jax.models.stripes import pool_stripes


def by_hand(x, num_stripes, overlap, kind="mean"):
    """The mean or maximum of each window itself, one after another, in float64."""
    x = np.asarray(x, np.float64)
    step = x.shape[-3] // num_stripes
    span, count = (2 * step, num_stripes - 1) if overlap else (step, num_stripes)
    windows = [x[..., i * step : i * step + span, :, :] for i in range(count)]
    return np.stack([getattr(window, kind)((-3, -2)) for window in windows], axis=-2)


@settings(deadline=None, max_examples=8)
@given(
    num_stripes=st.integers(2, 7),
    step=st.integers(1, 3),
    overlap=st.booleans(),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    kind=st.sampled_from(["mean", "max"]),
)
def test_windows(num_stripes, step, overlap, batch, kind):
    shape = (*batch, num_stripes * step, 3, 4)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = by_hand(x, num_stripes, overlap, kind)
    pooled = jax.jit(pool_stripes, static_argnums=(1, 2, 3))(x, num_stripes, overlap, kind)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


def test_composes_with_transformations():
    x = jax.random.normal(jax.random.key(0), (3, 12, 2, 4))
    direct = pool_stripes(x)
    np.testing.assert_allclose(jax.jit(pool_stripes)(x), direct, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(pool_stripes)(x), direct, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda y: pool_stripes(y).sum()))(x)
    # Each pixel of an inner stripe lies in two windows of 2 x 2 x 2 pixels, of an outer one in one.
    expected = np.full(12, 2 / 8)
    expected[:2] = expected[-2:] = 1 / 8
    np.testing.assert_allclose(gradient, np.broadcast_to(expected[:, None, None], x.shape))


def test_maxima_and_their_gradients_are_pytorchs(recorded):
    values = np.random.default_rng(0).standard_normal((3, 12, 2, 4)).astype(np.float32)
    x = jnp.asarray(values.round())  # many are equal

    def compute():
        import torch

        theirs = torch.tensor(values.round(), requires_grad=True)
        pooled = torch.nn.functional.max_pool2d(theirs.permute(0, 3, 1, 2), (4, 2)).squeeze(3)
        (pooled**2).sum().backward()
        return {"pooled": pooled.detach().permute(0, 2, 1), "gradient": theirs.grad}

    theirs = recorded(compute)

    @jax.jit
    def pool(y):
        return pool_stripes(y, 3, overlap=False, kind="max")

    np.testing.assert_array_equal(pool(x), theirs["pooled"])
    gradient = jax.jit(jax.grad(lambda y: (pool(y) ** 2).sum()))(x)
    np.testing.assert_allclose(gradient, theirs["gradient"], rtol=1e-6)
    whole = pool_stripes(x, 1, overlap=False, kind="max")
    np.testing.assert_array_equal(pool(x).max(axis=1, keepdims=True), whole)


def test_half_precision_is_summed_in_float32():
    x = jnp.full((1, 512, 1, 1), 1 + 1 / 128, jnp.bfloat16)
    pooled = pool_stripes(x, 2)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, np.float32(1 + 1 / 128))


@pytest.mark.parametrize(
    ("shape", "num_stripes", "overlap", "message"),
    [
        ((1, 16, 2, 3), 6, True, "height 16 cannot be cut into 6.*12 or 18"),
        ((1, 4, 2, 3), 6, True, "height 4 .* 6 equal stripes.*here 6"),
        ((4, 3), 6, True, r"shape \(4, 3\)"),
        ((1, 6, 2, 3), 1, True, "num_stripes is 1"),
        ((1, 6, 2, 3), 0, False, "num_stripes is 0"),
    ],
)
def test_bad_input(shape, num_stripes, overlap, message, unchecked):
    with pytest.raises(ValueError, match=message):
        pool_stripes(jnp.zeros(shape), num_stripes, overlap)


def test_another_kind_of_pooling(unchecked):
    kind: Any = "sum"
    with pytest.raises(UserError, match="kind of pooling is 'sum'; it must be 'mean' or 'max'"):
        pool_stripes(jnp.zeros((1, 6, 2, 3)), kind=kind)

"""The cosine classifier against PyTorch, and what makes it one; the generalized mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mros_jax.models.heads import CosineClassifiers, GeneralizedMean

MODEL = CosineClassifiers(num_classes=5, scale=14.0)


def make(seed=0):
    """Vectors (B, S, C) and the kernels (S, C, N) of S classifiers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 2, 8)).astype(np.float32)
    return x, rng.standard_normal((2, 8, 5)).astype(np.float32)


@jax.jit
def apply(x, kernel):
    return MODEL.apply({"params": {"kernel": kernel}}, jnp.asarray(x))


def test_cosines_are_pytorchs(recorded):
    x, kernel = make()

    def compute():
        import torch
        from torch.nn import functional as F

        pairs = [(x[:, s], kernel[s].T) for s in range(2)]
        unit = [[F.normalize(torch.from_numpy(v)) for v in pair] for pair in pairs]
        return {"logits": torch.stack([14 * F.linear(a, b) for a, b in unit], dim=1)}

    expected = recorded(compute)["logits"]
    np.testing.assert_allclose(apply(x, kernel), expected, rtol=1e-5, atol=1e-5)


def test_cosines_see_directions_alone():
    x, kernel = make()
    scales = np.linspace(0.1, 10, 5, dtype=np.float32)
    once = apply(x, kernel)
    np.testing.assert_allclose(apply(3 * x, kernel * scales), once, rtol=1e-5, atol=1e-5)
    own = np.moveaxis(kernel, 1, 2)[:, 2]  # a class's own direction has the largest logit
    np.testing.assert_allclose(apply(own[None], kernel)[0, :, 2], 14, rtol=1e-6)


def test_gradient_is_along_the_sphere():
    x, kernel = make()
    slopes = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(apply(*a))), argnums=(0, 1)))
    of_x, of_kernel = slopes(x, kernel)
    assert np.abs(of_x).max() > 0.1
    np.testing.assert_allclose(np.sum(of_x * x, axis=2), 0, atol=1e-4)
    np.testing.assert_allclose(np.sum(of_kernel * kernel, axis=1), 0, atol=1e-4)


def test_a_zero_vector_has_logits_and_a_gradient():
    x, kernel = make()
    zero = np.zeros_like(x)
    assert (apply(zero, kernel) == 0).all()
    assert np.isfinite(jax.jit(jax.grad(lambda a: apply(a, kernel).sum()))(zero)).all()


def test_each_classifier_starts_from_xaviers_distribution():
    model = CosineClassifiers(num_classes=751, scale=1.0)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2, 1024))))
    kernel = np.asarray(init(jax.random.key(0))["params"]["kernel"])
    assert kernel.shape == (2, 1024, 751)
    for one in kernel:
        np.testing.assert_allclose(one.std(), (2 / (1024 + 751)) ** 0.5, rtol=0.01)


def test_generalized_mean_lies_between_mean_and_maximum():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    positive = np.maximum(x.astype(np.float64), 1e-6)

    @jax.jit
    def pool(p):
        return GeneralizedMean().apply({"params": {"p": p[None]}}, jnp.asarray(x))

    expected = (positive**3).mean((1, 2)) ** (1 / 3)
    np.testing.assert_allclose(pool(np.float32(3)), expected, rtol=1e-5)
    np.testing.assert_allclose(pool(np.float32(1)), positive.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(pool(np.float32(60)), positive.max((1, 2)), rtol=0.1)
    start = GeneralizedMean().init(jax.random.key(0), jnp.asarray(x))["params"]
    np.testing.assert_array_equal(start["p"], [3.0])


def test_the_power_of_the_mean_is_learned():
    x = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (2, 3, 4, 5)).astype(np.float32))

    @jax.jit
    def total(p):
        pooled: Any = GeneralizedMean().apply({"params": {"p": p}}, x)
        return pooled.sum()

    slope = jax.jit(jax.grad(total))(jnp.array([3.0]))[0]
    step = 1e-2
    by_difference = (total(jnp.array([3 + step])) - total(jnp.array([3 - step]))) / (2 * step)
    np.testing.assert_allclose(slope, by_difference, rtol=1e-2)

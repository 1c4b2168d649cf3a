"""What is written twice computes the same, and as a plain forward pass, gradients as well.

Compiled as a whole, as users run it: one operation after another takes longer.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.models import layers


def plain_max_pool(x, stride):
    return nn.max_pool(x, (3, 3), (stride, stride), padding=((1, 1), (1, 1)))


def test_a_choice_by_platform_is_made_once():
    """Else each use would be traced, and kept, by itself."""
    x, kernel = jnp.ones((1, 6, 4, 2)), jnp.ones((3, 3, 1, 2))

    def use_all():
        layers.max_pool(x)
        layers.convolve_depthwise(x, kernel, 1)
        layers.convolve(x, jnp.ones((1, 1, 2, 2)), 1)

    jax.make_jaxpr(lambda: use_all())()
    made = layers._make_choice.cache_info().misses
    jax.make_jaxpr(lambda: use_all())()
    assert layers._make_choice.cache_info().misses == made


@functools.partial(jax.jit, static_argnums=(0, 1))
def pool_and_pull(pool, stride, x, dy):
    y, pull = jax.vjp(lambda x: pool(x, stride), x)
    return y, pull(dy)[0]


@pytest.mark.parametrize("pool", [layers.max_pool, layers.max_pool_on_cpu, layers.max_pool_plainly])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("size", [(8, 4), (7, 5), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_equals_the_library(stride, size, ties, pool):
    rng = np.random.default_rng(0)
    shape = (2, *size, 3)
    drawn = rng.integers(-2, 2, shape) if ties else rng.standard_normal(shape)
    x = jnp.asarray(drawn, jnp.float32)
    shape = (2, -(-size[0] // stride), -(-size[1] // stride), 3)
    dy = rng.standard_normal(shape).astype(np.float32)
    y, dx = pool_and_pull(pool, stride, x, dy)
    expected, expected_dx = pool_and_pull(plain_max_pool, stride, x, dy)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 3, 8), (40, 8, 3)])
def test_multiply(shape):
    m, c, f = shape
    key = jax.random.key(0)
    x, k = jax.random.normal(key, (m, c)), jax.random.normal(key, (c, f))
    ours = jax.jit(jax.grad(lambda x, k: jnp.sum(layers.multiply(x, k) ** 2), (0, 1)))(x, k)
    plain = jax.jit(jax.grad(lambda x, k: jnp.sum((x @ k) ** 2), (0, 1)))(x, k)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("size", [(7, 4), (1, 2)])
def test_depthwise_convolutions_agree(size, stride, dilation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *size, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 1, 5)), jnp.float32)
    shape = (2, -(-size[0] // stride), -(-size[1] // stride), 5)
    dy = jnp.asarray(rng.standard_normal(shape), x.dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(convolve):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, stride, dilation), x, kernel)
        return y, *pull(dy)

    plain = run(layers.convolve_depthwise_plainly)
    for convolve in (layers.convolve_depthwise, layers.convolve_depthwise_by_shifts):
        for ours, expected in zip(run(convolve), plain, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("features", [3, 9])
def test_1x1_convolutions_agree(stride, features):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 7, 4, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((1, 1, 5, features)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((2, -(-7 // stride), -(-4 // stride), features)), x.dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(convolve):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, stride), x, kernel)
        return y, *pull(dy)

    plain = run(layers.convolve_plainly)
    for convolve in (layers.convolve, layers.convolve_1x1_on_cpu):
        for ours, expected in zip(run(convolve), plain, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def lower(function, platform, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_each_platform_gets_its_own(platform):
    x, kernel = jnp.ones((2, 8, 4, 5)), jnp.ones((1, 1, 5, 3))
    dy = jnp.ones((2, 4, 2, 5))

    def convolve(x, kernel):
        return jax.vjp(lambda x, kernel: layers.convolve(x, kernel, 1), x, kernel)

    def pool(x, dy):
        return jax.vjp(layers.max_pool, x)[1](dy)

    def moments(x):
        return layers.normalize(x, jnp.ones(5), jnp.zeros(5), jnp.zeros(5), 1e-5, None)

    for function, args, accelerator in (
        (convolve, (x, kernel), "stablehlo.convolution"),
        (pool, (x, dy), "stablehlo.select_and_scatter"),
    ):
        assert accelerator in lower(function, platform, *args)
        assert accelerator not in lower(function, "cpu", *args)
    assert lower(moments, platform, x) != lower(moments, "cpu", x)


def plain_normalize(x, scale, bias, epsilon=1e-5, axis_name=None):
    axes = tuple(range(x.ndim - scale.ndim))
    mean, square = jnp.mean(x, axes), jnp.mean(x**2, axes)
    if axis_name is not None:
        mean, square = jax.lax.pmean((mean, square), axis_name)
    return (x - mean) / jnp.sqrt(square - mean**2 + epsilon) * scale + bias


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (6, 5, 3)])
def test_normalize(shape):
    axes = 2 if len(shape) == 3 else 1
    guess = jnp.zeros(shape[-axes:])
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.uniform(0.5, 2, shape[-axes:]), jnp.float32) for _ in range(2))

    def ours(*args):
        return layers.normalize(*args, guess, 1e-5, None)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def run(function):
        y, pull = jax.vjp(function, x, scale, bias)
        return y, *pull(dy)

    for a, b in zip(run(ours), run(plain_normalize), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(8, 4), (7, 5)])
def test_normalize_and_pool_equals_one_after_the_other(size, dtype):
    """Channels that rise, that fall, and that hardly differ."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(1 + 2 * rng.standard_normal((3, *size, 4)), dtype)
    scale, bias = jnp.asarray([1.5, -0.7, 0.1, -1e-2]), jnp.asarray([0.1, -0.2, 0, 0.3])
    dy = jnp.asarray(rng.standard_normal((3, 4, -(-size[1] // 2), 4)), jnp.float32)
    guess = jnp.full(4, 0.5)

    def apart(x, scale, bias):
        y, mean, var = layers.normalize(x, scale, bias, guess, 1e-5, None)
        return layers.max_pool(y), mean, var

    def together(x, scale, bias):
        return layers.normalize_and_pool(x, scale, bias, guess, 1e-5, None)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, x, scale, bias):
        (y, mean, var), pull = jax.vjp(function, x, scale, bias)
        return y, mean, var, *pull((dy, jnp.zeros(4), jnp.zeros(4)))

    found, expected = (run(function, x, scale, bias) for function in (together, apart))
    rounding = 1e-5 if dtype == jnp.float32 else 2**-7  # of gradients, which are of x's type
    names = ("y", "mean", "var", "dx", "dscale", "dbias")
    for name, ours, theirs in zip(names, found, expected, strict=True):
        bound = rounding if name.startswith("d") else 1e-6
        largest = float(jnp.abs(theirs).max())
        ours, theirs = (np.asarray(value, np.float32) for value in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, 0, bound * largest, err_msg=name)


def test_normalize_over_devices_equals_one_device():
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal((8, 5)), jnp.float32) for _ in range(2))
    scale, bias = jnp.full(5, 1.5), jnp.full(5, 0.5)

    @jax.jit
    def plain(dy):
        y, pull = jax.vjp(plain_normalize, x, scale, bias)
        return y, *pull(dy)

    def device(x, dy):
        y, pull = jax.vjp(
            lambda *a: layers.normalize(*a, jnp.zeros(5), 1e-5, "d")[0], x, scale, bias
        )
        dx, dscale, dbias = pull(dy)
        return y, dx, *jax.lax.psum((dscale, dbias), "d")

    parts = (a.reshape(4, 2, 5) for a in (x, dy))
    ours_y, dx, dscale, dbias = jax.pmap(device, axis_name="d")(*parts)
    ours = ours_y.reshape(8, 5), dx.reshape(8, 5), dscale[0], dbias[3]
    for a, b in zip(ours, plain(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moments", [layers.moments_in_two_passes, layers.moments_in_one_pass])
@pytest.mark.parametrize(("mean", "guess"), [(0.5, 0), (1000, 1001), (1000, 990)])
def test_moments(mean, guess, moments):
    x = jnp.asarray(mean + np.random.default_rng(0).standard_normal((64, 3)), jnp.float32)
    ours = jax.jit(lambda x: moments(x, jnp.full(3, guess, jnp.float32), None))(x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(ours[0], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(ours[1], exact.var(0), rtol=1e-4)


@pytest.mark.parametrize("moments", [layers.moments_in_two_passes, layers.moments_in_one_pass])
def test_moments_over_devices(moments):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 3)), jnp.float32)
    guess = jnp.full((4, 3), 0.1)
    ours = jax.pmap(functools.partial(moments, axis_name="d"), axis_name="d")(x, guess)
    exact = np.asarray(x)
    for part, moment in zip(ours, (exact.mean((0, 1)), exact.var((0, 1))), strict=True):
        np.testing.assert_allclose(part[2], moment, rtol=1e-5, atol=1e-6)


def test_one_value_many_times_has_no_variance():
    x = jnp.full((999, 2), 0.1, jnp.float32)
    _, var = jax.jit(lambda x: layers.moments_in_one_pass(x, jnp.full(2, 0.3), None))(x)
    assert (np.asarray(var) >= 0).all()


def test_normalize_as_accelerators_do(monkeypatch):
    """With statistics from one pass, values and gradients are those of two."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(2 + rng.standard_normal((6, 4, 5)), jnp.float32) for _ in range(2))
    scale, bias, guess = (jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32) for _ in range(3))

    def run():
        # A function of its own each time: it is traced again.
        return jax.jit(lambda *args: differentiate(*args))(x, scale, bias)

    def differentiate(x, scale, bias):
        y, pull = jax.vjp(lambda *a: layers.normalize(*a, guess, 1e-5, None)[0], x, scale, bias)
        return y, *pull(dy)

    expected = run()
    monkeypatch.setattr(layers, "moments_in_two_passes", layers.moments_in_one_pass)
    for ours, theirs in zip(run(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_large_means_do_not_cancel():
    x = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((64, 3)), jnp.float32)
    y, _, var = jax.jit(
        lambda x: layers.normalize(x, jnp.ones(3), jnp.zeros(3), jnp.zeros(3), 1e-5, None)
    )(x)
    np.testing.assert_allclose(var, np.var(np.asarray(x, np.float64), axis=0), rtol=1e-4)
    np.testing.assert_allclose(jnp.std(y, axis=0), 1, rtol=1e-4)

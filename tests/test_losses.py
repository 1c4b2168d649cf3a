"""Losses against formulas written out in NumPy, under jit, grad and vmap; devices; bad input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mros_jax import losses
from mros_jax.errors import UserError

# Shapes stay the same in property tests, so that each function compiles once.
B, D, N = 12, 5, 6


def random_batch(seed, identities=4):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((B, D)).astype(np.float32)
    return features, rng.integers(0, identities, B).astype(np.int32), rng.random(B) < 0.7


def triplet_by_hand(x, labels, margin, reduction, mask=None):
    x = np.asarray(x, np.float64)
    keep = np.ones(len(x), bool) if mask is None else mask
    terms = []
    for i in np.flatnonzero(keep):
        d = np.sqrt(((x - x[i]) ** 2).sum(1))
        positives = [d[j] for j in np.flatnonzero(keep & (labels == labels[i])) if j != i]
        negatives = d[keep & (labels != labels[i])]
        if positives and len(negatives):
            gap = max(positives) - negatives.min()
            terms.append(np.logaddexp(0, gap) if margin is None else max(0.0, gap + margin))
    total = sum(terms)
    return total / max(len(terms), 1) if reduction == "mean" else total


@functools.partial(jax.jit, static_argnums=(3, 4))
def triplet(features, labels, mask, margin=0.3, reduction="mean"):
    return losses.batch_hard_triplet(
        features, labels, mask=mask, margin=margin, reduction=reduction
    )


@jax.jit
def center(features, labels, centers, mask):
    return losses.center_loss(features, labels, centers, mask=mask)


@jax.jit
def cross_entropy(logits, labels, mask):
    return losses.smoothed_cross_entropy(logits, labels, mask=mask)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    identities=st.integers(1, 8),
    margin=st.sampled_from([0.3, None]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_triplet(seed, identities, margin, reduction):
    x, labels, mask = random_batch(seed, identities)
    expected = triplet_by_hand(x, labels, margin, reduction, mask)
    np.testing.assert_allclose(
        triplet(x, labels, mask, margin, reduction), expected, rtol=1e-5, atol=1e-6
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_losses_do_not_depend_on_the_order(seed):
    x, labels, mask = random_batch(seed)
    order = np.random.default_rng(seed).permutation(B)
    centers = np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)
    for loss in (triplet, functools.partial(center, centers=centers)):
        direct = loss(features=x, labels=labels, mask=mask)
        moved = loss(features=x[order], labels=labels[order], mask=mask[order])
        np.testing.assert_allclose(moved, direct, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), garbage=st.sampled_from([1e30, np.nan, np.inf]))
def test_masked_examples_contribute_nothing(seed, garbage):
    x, labels, mask = random_batch(seed)
    centers = np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)
    spoilt = np.where(mask[:, None], x, np.float32(garbage))
    wrong_labels = np.where(mask, labels, -1).astype(np.int32)
    for loss in (triplet, functools.partial(center, centers=centers)):
        value = loss(features=x, labels=labels, mask=mask)
        assert loss(features=spoilt, labels=wrong_labels, mask=mask) == value
    logits, spoilt_logits = x[:, :4], spoilt[:, :4]
    assert cross_entropy(spoilt_logits, wrong_labels, mask) == cross_entropy(logits, labels, mask)


def test_masked_garbage_has_no_gradient():
    x, labels, mask = random_batch(0)
    spoilt = np.where(mask[:, None], x, np.nan)
    gradient = np.asarray(jax.jit(jax.grad(triplet))(spoilt, labels, mask))
    assert np.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all()


def test_triplet_far_from_the_origin_and_scaled():
    x, labels, mask = random_batch(1)
    np.testing.assert_allclose(triplet(x + 100, labels, mask), triplet(x, labels, mask), rtol=1e-4)
    np.testing.assert_allclose(
        triplet(3 * x, labels, mask, 0.9), 3 * triplet(x, labels, mask, 0.3), rtol=1e-5
    )


def test_triplet_of_equal_images_has_a_finite_gradient():
    x = np.ones((B, D), np.float32)
    labels = np.repeat(np.arange(3), 4).astype(np.int32)
    value, gradient = jax.jit(jax.value_and_grad(triplet))(x, labels, np.ones(B, bool))
    assert value == pytest.approx(0.3)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("labels", [np.zeros(B, np.int32), np.arange(B, dtype=np.int32)])
def test_no_valid_pair_gives_zero(labels):
    x, _, _ = random_batch(2)
    value, gradient = jax.jit(jax.value_and_grad(triplet))(x, labels, np.ones(B, bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_everything_masked_gives_zero():
    x, labels, _ = random_batch(2)
    none = np.zeros(B, bool)
    assert triplet(x, labels, none) == 0
    assert center(x, labels, np.ones((N, D), np.float32), none) == 0
    assert cross_entropy(x, labels, none) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_center_loss(reduction):
    x, labels, _ = random_batch(3)
    centers = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
    squared = ((x.astype(np.float64) - centers[labels]) ** 2).sum(1)
    expected = squared.mean() if reduction == "mean" else squared.sum() / 2
    loss = jax.jit(functools.partial(losses.center_loss, reduction=reduction))
    value = loss(x, labels, centers)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0, 0.1, 1])
def test_cross_entropy_over_heads(smoothing):
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((B, 3, N)).astype(np.float32)
    labels = rng.integers(0, N, B).astype(np.int32)
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(N)[labels] + smoothing / N
    expected = -(target[:, None] * log_p).sum(-1).mean()
    loss = jax.jit(functools.partial(losses.smoothed_cross_entropy, smoothing=smoothing))
    value = loss(logits, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def sort_out(logits, labels, share):
    """The mean of the worst losses by NumPy, and which they are."""
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    each = -log_p[np.arange(len(labels)), labels]
    worst = np.argsort(-each)[: max(int(share * len(labels) + 1e-9), 1)]
    return each[worst].mean(), worst


@pytest.mark.parametrize(("share", "count"), [(0.8, 51), (0.29, 18), (0.75, 48), (0.001, 1)])
def test_worst_share_is_a_sorted_mean(share, count):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((64, N)).astype(np.float32)
    labels = rng.integers(0, N, 64).astype(np.int32)
    loss = jax.jit(functools.partial(losses.smoothed_cross_entropy, smoothing=0, share=share))
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits, labels)
    expected, worst = sort_out(logits, labels, share)
    assert len(worst) == count
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(np.flatnonzero(np.any(gradient, axis=1))) == set(worst)

    mask = rng.random(64) < 0.7
    value = loss(logits, labels, mask=mask)
    np.testing.assert_allclose(value, sort_out(logits[mask], labels[mask], share)[0], rtol=1e-5)
    assert loss(logits, labels, mask=np.zeros(64, bool)) == 0
    labels[3] = N
    assert np.isnan(loss(logits, labels))


def test_worst_share_of_the_batch_of_all_devices():
    """A device may have none of them; value and gradient are those of one device."""
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((16, N)).astype(np.float32)
    logits[:4] *= 0.01
    labels = np.argmax(logits, axis=1).astype(np.int32)
    labels[4:] = rng.integers(0, N, 12)

    def loss(scale, logits, labels, axis_name=None):
        return losses.smoothed_cross_entropy(
            scale * logits, labels, smoothing=0, share=0.5, axis_name=axis_name
        )

    def on_a_device(*args):
        value, gradient = jax.value_and_grad(functools.partial(loss, axis_name="d"))(*args)
        return value, jax.lax.pmean(gradient, "d")

    expected = jax.jit(jax.value_and_grad(loss))(jnp.float32(1.5), logits, labels)
    found = jax.pmap(on_a_device, axis_name="d", in_axes=(None, 0, 0))(
        jnp.float32(1.5), logits.reshape(4, 4, N), labels.reshape(4, 4)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, np.full(4, y), rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_no_share_of_a_batch(share):
    x, labels, _ = random_batch(0)
    with pytest.raises(UserError, match=r"share is .*; it must be above 0"):
        losses.smoothed_cross_entropy(jnp.asarray(x), jnp.asarray(labels), share=share)


def make_peers():
    return 3 * np.random.default_rng(7).standard_normal((B, 3, N)).astype(np.float32)


def test_mutual_divergence_is_pytorchs(recorded):
    """Each classifier's softmax, held fixed, is a target for all others."""

    def compute():
        import torch
        from torch.nn import functional as F

        z = torch.tensor(make_peers(), requires_grad=True)
        pairs = [
            F.kl_div(z[:, j].log_softmax(1), z[:, i].detach().softmax(1), reduction="batchmean")
            for i in range(3)
            for j in range(3)
            if i != j
        ]
        loss = sum(pairs) / len(pairs)
        loss.backward()
        return {"loss": loss.detach(), "gradient": z.grad}

    theirs = recorded(compute)
    value, gradient = jax.jit(jax.value_and_grad(losses.mutual_divergence))(make_peers())
    np.testing.assert_allclose(value, theirs["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs["gradient"], rtol=1e-4, atol=1e-6)


def test_classifiers_that_agree_learn_nothing_from_each_other():
    same = jnp.repeat(make_peers()[:, :1], 3, axis=1)
    value, gradient = jax.jit(jax.value_and_grad(losses.mutual_divergence))(same)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_mutual_divergence_of_the_batch_of_all_devices():
    logits = make_peers()
    whole = jax.jit(losses.mutual_divergence)(logits)
    on_a_device = functools.partial(losses.mutual_divergence, axis_name="d")
    found = jax.pmap(on_a_device, axis_name="d")(logits.reshape(4, B // 4, 3, N))
    np.testing.assert_allclose(found, np.full(4, whole), rtol=1e-5)


@pytest.mark.parametrize("shape", [(B, N), (B, 1, N)])
def test_one_classifier_alone_has_no_peers(shape, unchecked):
    with pytest.raises(UserError, match="S of 2 or more classifiers"):
        losses.mutual_divergence(jnp.zeros(shape))


def test_cross_entropy_of_huge_logits_is_finite():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    loss = jax.jit(losses.smoothed_cross_entropy, static_argnames="smoothing")
    assert loss(logits, jnp.array([0]), smoothing=0) == 0
    assert np.isfinite(loss(logits, jnp.array([1])))


def test_vmap_is_a_loop():
    xs = np.stack([random_batch(seed)[0] for seed in range(3)])
    _, labels, mask = random_batch(0)
    batched = jax.vmap(triplet, in_axes=(0, None, None))(xs, labels, mask)
    np.testing.assert_allclose(batched, [triplet(x, labels, mask) for x in xs], rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, N])
def test_labels_out_of_range_give_nan_and_a_clear_error_on_the_host(bad):
    x, labels, mask = random_batch(5)
    labels[3], mask[3] = bad, True
    assert jnp.isnan(center(x, labels, np.zeros((N, D), np.float32), mask))
    assert jnp.isnan(cross_entropy(np.zeros((B, N), np.float32), labels, mask))
    with pytest.raises(ValueError, match=rf"label {bad} at 3 is not in 0\.\.5 \(1 bad of 12\)"):
        losses.check_labels(labels, N)
    with pytest.raises(ValueError, match="float64"):
        losses.check_labels(labels / 2, N)
    losses.check_labels(np.arange(N), N)


def test_bad_shapes(unchecked):
    x, labels = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    other: Any = "max"
    cases = {
        r"labels have shape \(3,\); expected \(4,\)": lambda: losses.batch_hard_triplet(
            x, labels[:3]
        ),
        r"features have shape \(4,\)": lambda: losses.batch_hard_triplet(x[:, 0], labels),
        r"mask has shape \(2,\)": lambda: losses.batch_hard_triplet(
            x, labels, mask=jnp.ones(2, bool)
        ),
        "reduction is 'max'": lambda: losses.center_loss(x, labels, x, reduction=other),
        r"expected \(N, 3\)": lambda: losses.center_loss(x, labels, jnp.zeros((4, 2))),
        "smoothing is 2": lambda: losses.smoothed_cross_entropy(x, labels, smoothing=2),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()

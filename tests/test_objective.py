"""Objectives: named terms on named outputs, by hand and on several devices; bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.config import read
from mros_jax.errors import UserError
from mros_jax.losses import make_objective, mutual_divergence
from mros_jax.models.outputs import Outputs
from tests.test_losses import triplet_by_hand

B, N = 12, 6
SETTINGS = ("I", "II", "III", "IV")


def make_outputs(setting, rng, batch=B):
    """Outputs of a network with t3 of 3 and t4 of 4 channels, 5 (or 6) stripes, N classes."""
    stripes = 6 if setting == "I" else 5
    levels = {"t3": 3, "t4": 4} if setting == "IV" else {"t4": 4}
    g = {f"g_{k}": jnp.asarray(rng.standard_normal((batch, stripes, c)), jnp.float32)
         for k, c in levels.items()}  # fmt: skip
    logits = {k: jnp.asarray(rng.standard_normal((batch, stripes, N)), jnp.float32) for k in levels}
    descriptor = jnp.concatenate([v.reshape(batch, -1) for v in g.values()], axis=1)
    return Outputs(descriptor, g, logits, {})


def init(objective, key, outputs, num_classes):
    return jax.jit(lambda key, outputs: objective.init(key, outputs, num_classes))(key, outputs)


def evaluate(objective, outputs, labels):
    """Of an objective without parameters of its own, compiled as a whole: (total, parts)."""
    return jax.jit(lambda outputs, labels: objective({}, outputs, labels))(outputs, labels)


def mros_sections(setting):
    return read("configs/mros.py", setting).objective.to_dict()


def random_labels(seed, batch=B):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 4, batch), jnp.int32)


@pytest.mark.parametrize("setting", SETTINGS)
def test_mros_by_hand(setting):
    outputs, labels = make_outputs(setting, np.random.default_rng(6)), random_labels(6)
    sections = mros_sections(setting)
    sections["center"]["weight"] = 0.01
    objective = make_objective(sections)
    own = init(objective, jax.random.key(0), outputs, N)
    assert own.keys() == {"center"}
    ((name, centers),) = own["center"].items()
    shapes = {"I": (6, N, 4), "II": (5, N, 4), "III": (N, 20), "IV": (N, 35)}
    assert centers.shape == shapes[setting]
    vectors = np.moveaxis(np.asarray(outputs.vectors(name)), 1, 0)
    assert (name == "descriptor") == (setting in ("III", "IV"))

    triplet = np.mean([triplet_by_hand(x, np.asarray(labels), 0.3, "mean") for x in vectors])
    stacked = np.asarray(centers).reshape(-1, *centers.shape[-2:])  # (S, N, D)
    pulls = [x - c[labels] for x, c in zip(vectors, stacked, strict=True)]
    center = np.mean([np.square(pull).sum(1).mean() for pull in pulls])
    heads = np.concatenate([np.asarray(v) for v in outputs.logits.values()], axis=1)
    log_p = heads - np.log(np.exp(heads).sum(-1, keepdims=True))
    target = 0.9 * np.eye(N)[labels] + 0.1 / N
    cross = -(target[:, None] * log_p).sum(-1).mean()

    def total_of(own):
        return objective(own, outputs, labels)

    (total, parts), slope = jax.jit(jax.value_and_grad(total_of, has_aux=True))(own)
    np.testing.assert_allclose(parts["triplet"], triplet, rtol=1e-4)
    np.testing.assert_allclose(parts["center"], center, rtol=1e-4)
    np.testing.assert_allclose(parts["cross_entropy"], cross, rtol=1e-4)
    np.testing.assert_allclose(total, triplet + 0.01 * center + cross, rtol=1e-4)

    # The centers see their term unweighted.
    label = int(labels[0])
    expected = -2 * pulls[0][np.asarray(labels) == label].sum(0) / B / len(vectors)
    slopes = np.asarray(slope["center"][name]).reshape(stacked.shape)
    np.testing.assert_allclose(slopes[0, label], expected, rtol=1e-4, atol=1e-6)
    assert (slopes[:, 5] == 0).all()  # no image of class 5


@pytest.mark.parametrize("setting", ["II", "IV"])
def test_devices_see_the_global_batch(setting):
    """Values and (by pmean) gradients equal those of one device."""
    outputs, labels = make_outputs(setting, np.random.default_rng(7), 16), random_labels(7, 16)
    objective = make_objective(mros_sections(setting))
    own = init(objective, jax.random.key(0), outputs, N)

    def step(params, outputs, labels, axis_name=None):
        """`scale` stands for parameters of the network that all devices share."""

        def loss(params):
            scaled = jax.tree.map(lambda x: x * params["scale"], outputs)
            return objective(params["own"], scaled, labels, axis_name=axis_name)

        result = jax.value_and_grad(loss, has_aux=True)(params)
        if axis_name is not None:
            result = (result[0], jax.lax.pmean(result[1], axis_name))
        return result

    params = {"scale": jnp.float32(1.5), "own": own}
    expected = jax.jit(step)(params, outputs, labels)
    split = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), (outputs, labels))
    found = jax.pmap(functools.partial(step, axis_name="d"), axis_name="d", in_axes=(None, 0, 0))(
        params, *split
    )
    for device in range(4):
        jax.tree.map(
            lambda a, b, i=device: np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=1e-6),
            found,
            expected,
        )


def test_heads_are_averaged_or_summed():
    outputs, labels = make_outputs("IV", np.random.default_rng(8)), random_labels(8)
    losses = {
        heads: make_objective({"x": {"loss": "cross_entropy", "on": ("t3", "t4"), "heads": heads}})
        for heads in ("mean", "sum")
    }
    mean, total = (float(evaluate(losses[h], outputs, labels)[0]) for h in ("mean", "sum"))
    assert total == pytest.approx(10 * mean, rel=1e-6)


def test_classifiers_of_several_outputs_learn_from_each_other():
    outputs, labels = make_outputs("IV", np.random.default_rng(8)), random_labels(8)
    objective = make_objective({"x": {"loss": "mutual", "on": ("t3", "t4"), "weight": 0.5}})
    together = jnp.concatenate([outputs.logits["t3"], outputs.logits["t4"]], axis=1)
    expected = jax.jit(mutual_divergence)(together)
    total, parts = evaluate(objective, outputs, labels)
    assert expected > 0.1
    np.testing.assert_allclose(parts["x"], expected, rtol=1e-6)
    np.testing.assert_allclose(total, expected / 2, rtol=1e-6)


def test_several_outputs_of_one_term_are_averaged_over_their_vectors():
    outputs, labels = make_outputs("IV", np.random.default_rng(9)), random_labels(9)
    objective = make_objective({"x": {"loss": "triplet", "on": ("g_t3", "descriptor")}})
    expected = [
        triplet_by_hand(x, np.asarray(labels), 0.3, "mean")
        for x in (
            *np.moveaxis(np.asarray(outputs.embeddings["g_t3"]), 1, 0),
            np.asarray(outputs.descriptor),
        )
    ]
    total, _ = evaluate(objective, outputs, labels)
    np.testing.assert_allclose(total, np.mean(expected), rtol=1e-5)


def test_centers_are_standard_normal_and_differ_between_outputs():
    outputs = make_outputs("IV", np.random.default_rng(8))
    objective = make_objective({"c": {"loss": "center", "on": ("g_t3", "g_t4")}})
    centers = jax.device_get(init(objective, jax.random.key(1), outputs, 2000)["c"])
    assert {k: v.shape for k, v in centers.items()} == {"g_t3": (5, 2000, 3), "g_t4": (5, 2000, 4)}
    for value in centers.values():
        assert abs(float(value.mean())) < 0.02
        assert abs(float(value.std()) - 1) < 0.02
    assert not np.isin(centers["g_t3"][:, 0], centers["g_t4"]).any()


def test_a_term_of_weight_zero_is_left_out():
    sections = mros_sections("IV")
    sections["center"]["weight"] = 0.0
    objective = make_objective(sections)
    outputs = make_outputs("IV", np.random.default_rng(0))
    assert objective.terms.keys() == {"triplet", "cross_entropy"}
    assert objective.init(jax.random.key(0), outputs, N) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "objective.x.loss is 'hinge'; expected one of center, cross_entropy"),
        ({"margn": 1}, "objective.x has no field margn; triplet has on, weight, margin"),
        ({"margin": -5.0}, "objective.x: margin is -5.0; it must not be negative"),
        ({"weight": -1.0}, "objective.x: weight is -1.0; it must be above 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": 0}, "no term of weight above 0"),
        ({"on": ()}, "is on no output"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_what_is_no_objective(change, message, unchecked):
    with pytest.raises(UserError, match=message):
        make_objective({"x": {"loss": "triplet", "on": ("descriptor",), **change}})


def test_outputs_that_are_not_there():
    outputs, labels = make_outputs("III", np.random.default_rng(0)), random_labels(0)
    triplet = make_objective({"x": {"loss": "triplet", "on": ("g_t3",)}})
    with pytest.raises(
        UserError, match="no output 'g_t3' for a metric loss; it has descriptor, g_"
    ):
        triplet({}, outputs, labels)
    cross = make_objective({"x": {"loss": "cross_entropy", "on": ("t3",)}})
    with pytest.raises(UserError, match="no logits 't3'; it has t4"):
        cross({}, outputs, labels)

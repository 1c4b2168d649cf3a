"""Refined part pooling: what it computes, and that it starts as PCB."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mros_jax import parallel
from mros_jax.config import read, shrink, split_stages
from mros_jax.errors import UserError
from mros_jax.models.stripes import pool_stripes
from mros_jax.systems.pcb_rpp import PartClassifier, pool_parts
from mros_jax.training import recipe

rng = np.random.default_rng(0)
FEATURES = jnp.asarray(rng.standard_normal((2, 12, 4, 16)), jnp.float32)


def test_columns_of_one_part_each_are_stripes():
    rows = np.repeat(np.arange(6), 2)  # of 12
    parts = jnp.broadcast_to(jnp.eye(6)[rows][None, :, None], (2, 12, 4, 6))
    stripes = pool_stripes(FEATURES, 6, overlap=False)
    np.testing.assert_allclose(pool_parts(FEATURES, parts), stripes, rtol=1e-5, atol=1e-6)


def test_equal_shares_are_the_mean():
    shares = jnp.full((2, 12, 4, 6), 1 / 6)
    mean = np.broadcast_to(FEATURES.mean(axis=(1, 2))[:, None], (2, 6, 16))
    np.testing.assert_allclose(pool_parts(FEATURES, shares), mean, rtol=1e-5, atol=1e-6)


def assign(kind, x, temperature=1.0):
    model = PartClassifier(6, kind=kind, temperature=temperature)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False, keys=None))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape, np.float32), shapes)
    return params["params"], np.asarray(model.apply(params, x, train=False, keys=None))


@pytest.mark.parametrize("kind", ["paper", "authors"])
def test_shares(kind):
    """Against a formula for one column; the authors' do not see what all columns share."""
    params, shares = assign(kind, FEATURES, temperature=2.0)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, rtol=1e-6)
    assert shares.std() > 0.05
    x = np.asarray(FEATURES)
    if kind == "authors":
        x = np.stack([x[..., :8].mean(-1), x[..., 8:].mean(-1)], axis=-1)
        x = x - x.mean(axis=(1, 2), keepdims=True)
        _, shifted = assign(kind, FEATURES + np.arange(16, dtype=np.float32), temperature=2.0)
        np.testing.assert_allclose(shifted, shares, rtol=1e-4, atol=1e-6)
    logits = 2 * (x[1, 3, 2] @ params["kernel"] + params.get("bias", 0))
    powers = np.exp(logits)
    np.testing.assert_allclose(shares[1, 3, 2], powers / powers.sum(), rtol=1e-4)


def test_fields_that_make_no_part_classifier():
    for fields, message in (
        ({"kind": "poet"}, "part_classifier is 'poet'; expected one of paper, authors"),
        ({"kind": "paper", "dropout": 0.5}, "part_dropout is 0.5; only the authors'"),
    ):
        with pytest.raises(UserError, match=message):
            PartClassifier(6, **fields).init(jax.random.key(0), FEATURES, train=False, keys=None)
    odd = jnp.zeros((1, 12, 4, 12))
    with pytest.raises(UserError, match="a multiple of 8 channels; the trunk has 12"):
        PartClassifier(6, kind="authors").init(jax.random.key(0), odd, train=False, keys=None)


@pytest.mark.slow
def test_first_stage_is_pcb():
    """Two steps of both, dropout and augmentation on, leave the same parameters and statistics."""
    images = rng.integers(0, 256, (4, 96, 48, 3), np.uint8)
    devices = jax.devices()[:1]
    batch = parallel.split({"images": images, "labels": np.arange(4, dtype=np.int32)}, devices)
    ends, start = {}, None
    for name in ("pcb_rpp", "pcb"):
        config = shrink(read(f"configs/{name}.py").unlock())
        config.schedule.decay_epochs = ()
        parts = recipe.build(config, num_classes=4, steps_per_epoch=2)
        state = parts.state
        if start is not None:
            network = {key: start.params["network"][key] for key in state.params["network"]}
            assert set(start.params["network"]) - set(network) == {"part_classifier"}
            state = dataclasses.replace(state, params={"network": network, "objective": {}})
        start = state
        state, step = parallel.replicate(state, devices), parallel.MappedStep(parts.step, devices)
        for _ in range(2):
            state, _ = step(state, None, batch)
        ends[name] = jax.device_get((state.params["network"], state.batch_stats))
    refined, plain = (traverse_util.flatten_dict(dict(enumerate(x))) for x in ends.values())
    for path, value in plain.items():
        np.testing.assert_allclose(refined[path], value, rtol=1e-5, atol=1e-6, err_msg=str(path))
    assert start is not None


def split(**changes):
    config = read("configs/pcb_rpp.py").unlock()
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = config
        for word in sections:
            section = section[word]
        section[field] = value
    return split_stages(config.lock())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 70}, r"num_epochs is 70.* stage1, stage2, stage3 are 60 \+ 5 \+ 10 = 75"),
        ({"stages__stage2__epochs": 6}, r"num_epochs is 75.*60 \+ 6 \+ 10 = 76"),
        ({"stages__stage2__epochs": 0}, r"num_epochs is 75.* stage1, stage3 are 60 \+ 10 = 70"),
        ({"stages__stage2__epochs": -1}, "config.stages.stage2.epochs is -1; it must be 1 or more"),
        ({f"stages__stage{i}__epochs": 0 for i in (1, 2, 3)}, "epochs are all 0; at least one"),
        ({"stages__stage4": 10}, "config.stages.stage4 is 10; expected a section"),
        ({"stages__stage3__rate": 0.1}, "config.stages.stage3 has no field rate; there are epochs"),
        ({"stages__stage3__network": "pcb"}, "stages.stage3.network is 'pcb'; expected a section"),
        (
            {"stages__stage3__schedule": {"decay": "steps", "warmup_steps": 3}},
            "config.stages.stage3.schedule has no field warmup_steps; there are",
        ),
        ({"stages__stage3__network": {"trunk": 50}}, "config.stages.stage3: .*trunk"),
        ({"num_steps": 100}, "num_steps is 100; stages are counted in epochs"),
    ],
)
def test_stages_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        split(**changes)


def test_an_impossible_part_of_a_stage_is_named():
    config = shrink(read("configs/pcb_rpp.py").unlock())
    config.stages.stage2.optimizer.trunk.lr = -1.0
    with pytest.raises(UserError, match=r"stages.stage2: optimizer.trunk: lr -1\.0"):
        recipe.check_config(config)
    config.stages.stage2.optimizer.trunk.lr = 0.1
    config.accumulate_steps = 5
    with pytest.raises(UserError, match=r"config.stages.stage2: .*only 4 steps"):
        recipe.build(config, num_classes=4, steps_per_epoch=2)


def test_a_stage_may_have_its_own_schedule():
    stages = split(stages__stage3__schedule={"decay_epochs": (4,)})
    rates = [
        float(recipe.make_schedules(stage, steps_per_epoch=2)["part_classifier"](jnp.int32(10)))
        for name, stage in stages.items()
        if name != "stage1"
    ]
    assert rates == pytest.approx([0.01, 0.001])

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mros_jax.training.optimizers import make_optimizer, make_schedule, update_centers


def test_schedule_has_the_papers_numbers():
    rate = make_schedule(steps_per_epoch=7)
    expected = {0: 1e-5, 1: 1.09e-4, 5: 5.05e-4, 9: 9.01e-4, 10: 1e-3, 29: 1e-3}
    expected |= {30: 1e-4, 59: 1e-4, 60: 1e-5, 89: 1e-5, 90: 1e-6, 119: 1e-6}
    for epoch, value in expected.items():
        for step in (7 * epoch, 7 * epoch + 6):
            np.testing.assert_allclose(rate(step), value, rtol=1e-6)
            np.testing.assert_allclose(jax.jit(rate)(jnp.int32(step)), value, rtol=1e-6)


def test_warm_up_per_iteration():
    rate = make_schedule(steps_per_epoch=10, warmup_per="iteration")
    steps = np.arange(0, 101)
    expected = 1e-3 * (0.01 * (1 - steps / 100) + steps / 100)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.asarray(steps)), expected, rtol=1e-5)


def test_schedule_options():
    rate = make_schedule(lr=2, steps_per_epoch=1, warmup_epochs=0, milestones=(1, 3), decay=0.5)
    assert [float(rate(step)) for step in range(5)] == [2, 1, 1, 0.5, 0.5]
    constant = make_schedule(lr=3, steps_per_epoch=1, warmup_epochs=0, milestones=())
    assert float(constant(10**6)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr 0 must be above 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch 0"),
        ({"milestones": (60, 30)}, r"milestones \(60, 30\) must be increasing"),
        ({"decay": 10}, "decay 10"),
        ({"warmup_per": "step"}, "warmup_per is 'step'"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule.__wrapped__(**{"steps_per_epoch": 5, **options})


PARAMS = {
    "conv": {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)},
    "bn": {"scale": np.ones(3, np.float32), "bias": np.full(3, 0.5, np.float32)},
}


def gradient(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), PARAMS)


def run(optimizer, steps, gradients=gradient):
    params, state = jax.tree.map(jnp.asarray, PARAMS), optimizer.init(PARAMS)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(params, state, gradients(step))
    return params


def run_torch(kind, steps, rates, *, every=1, clip=None):
    leaves, tree = jax.tree.flatten(PARAMS)
    params = [torch.tensor(x, requires_grad=True) for x in leaves]
    optimizer = kind(params, lr=1.0, weight_decay=0.05)
    for step in range(steps):
        for p, g in zip(params, jax.tree.leaves(gradient(step)), strict=True):
            p.grad = torch.from_numpy(g) / every + (0 if p.grad is None else p.grad)
        if (step + 1) % every == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, clip)
            optimizer.param_groups[0]["lr"] = rates(step)
            optimizer.step()
            optimizer.zero_grad()
    return tree.unflatten([p.detach().numpy() for p in params])


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"clip": 0.7}, {"every": 2, "clip": 0.7}])
def test_steps_equal_pytorchs(name, kind, options):
    schedule = make_schedule(
        lr=0.1, steps_per_epoch=3, warmup_epochs=2, warmup_per="iteration", milestones=(3,)
    )
    optimizer = make_optimizer(
        schedule,
        name=name,
        weight_decay=0.05,
        clip_norm=options.get("clip"),
        accumulate_steps=options.get("every", 1),
    )
    ours = run(optimizer, 12)
    theirs = run_torch(kind, 12, lambda step: float(schedule(step)), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_decay_of_kernels_only(name):
    def zeros(_):
        return jax.tree.map(np.zeros_like, PARAMS)

    rate = make_schedule(steps_per_epoch=1, warmup_epochs=0)
    optimizer = make_optimizer(rate, name=name, decay_norm_and_bias=False)
    params = run(optimizer, 2, zeros)
    assert (params["conv"]["kernel"] != PARAMS["conv"]["kernel"]).any()
    jax.tree.map(np.testing.assert_array_equal, params["bn"], PARAMS["bn"])
    params = run(make_optimizer(rate, name=name), 2, zeros)
    assert (params["bn"]["scale"] != 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgd"}, "optimizer name is 'sgd'"),
        ({"weight_decay": -1}, "weight_decay -1"),
        ({"clip_norm": 0}, "clip_norm 0 must be above 0"),
        ({"accumulate_steps": 0}, "accumulate_steps is 0"),
    ],
)
def test_bad_optimizers(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer.__wrapped__(make_schedule(steps_per_epoch=1), **options)


def test_centers_take_a_plain_step():
    centers, slope = jnp.ones((1, 2, 3)), jnp.full((1, 2, 3), 4.0)
    np.testing.assert_array_equal(update_centers(centers, slope), -1)
    np.testing.assert_array_equal(update_centers(centers, slope, lr=0.25), 0)

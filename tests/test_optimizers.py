"""Schedules against tables; groups of parameters against PyTorch's optimizers; bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mros_jax.errors import UserError
from mros_jax.training.optimizers import (
    label_params,
    make_groups,
    make_optimizer,
    make_schedule,
    make_schedules,
    stop_frozen,
)


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
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(steps), expected, rtol=1e-5)


def test_exponential_warm_up():
    """By equal ratios, from 1e-5 to 1e-3 in 20 epochs."""
    rate = make_schedule(
        steps_per_epoch=3, warmup="exponential", warmup_epochs=20, warmup_factor=0.01,
        decay_epochs=(30,),
    )  # fmt: skip
    for epoch, value in {0: 1e-5, 5: 10**-4.5, 10: 1e-4, 19: 10**-3.1, 20: 1e-3, 30: 1e-4}.items():
        for step in (3 * epoch, 3 * epoch + 2):
            np.testing.assert_allclose(jax.jit(rate)(step), value, rtol=1e-5)
    by_step = make_schedule(
        steps_per_epoch=3, warmup="exponential", warmup_epochs=2, warmup_per="iteration",
        warmup_factor=1e-3, decay_epochs=(),
    )  # fmt: skip
    expected = 1e-3 * 1e-3 ** (1 - np.arange(7) / 6)
    np.testing.assert_allclose(jax.jit(jax.vmap(by_step))(np.arange(7)), expected, rtol=1e-5)


def test_exponential_decay_by_the_step():
    """3e-4 up to step 15,000, then a thousandth in 10,000 steps (Hermans et al., 2017, Eq. 9)."""
    rate = make_schedule(
        lr=3e-4, steps_per_epoch=179, warmup_epochs=0, decay="exponential", decay_epochs=(),
        decay_start=15_000, decay_length=10_000, decay_factor=0.001,
    )  # fmt: skip
    expected = {0: 3e-4, 15_000: 3e-4, 15_001: 3e-4 * 0.001**1e-4, 20_000: 9.48683e-6, 25_000: 3e-7}
    for step, value in expected.items():
        np.testing.assert_allclose(jax.jit(rate)(step), value, rtol=1e-5)


def test_cosine_with_growing_restarts():
    """MFBN's: warm-up to epoch 10, counted from 1, then cycles of 10, 20, 40, ... epochs."""
    rate = make_schedule(
        lr=2e-3, steps_per_epoch=46, warmup_epochs=9, warmup_factor=0.1, decay="cosine_restarts",
        decay_epochs=(), cycle_epochs=10, cycle_growth=2,
    )  # fmt: skip
    expected = {1: 2e-4, 5: 1e-3, 11: 1.951057e-3, 15: 1e-3, 19: 4.894348e-5, 600: 7.612047e-5}
    expected |= dict.fromkeys((10, 20, 40, 80, 160, 320), 2e-3)
    for epoch, value in expected.items():
        for step in (46 * (epoch - 1), 46 * (epoch - 1) + 45):
            np.testing.assert_allclose(jax.jit(rate)(step), value, rtol=1e-6)


@pytest.mark.parametrize(("first", "growth"), [(7, 1), (2, 3)])
def test_cycles_of_a_cosine(first, growth):
    rate = make_schedule(
        lr=1, steps_per_epoch=1, warmup_epochs=0, decay="cosine_restarts", decay_epochs=(),
        cycle_epochs=first, cycle_growth=growth,
    )  # fmt: skip
    lengths = [first * growth**i for i in range(12)]
    shares = [i / length for length in lengths for i in range(length)][:80]
    expected = (1 + np.cos(np.pi * np.array(shares))) / 2
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(jnp.arange(80)), expected, rtol=1e-6)


def test_schedule_options():
    rate = make_schedule(
        lr=2, steps_per_epoch=1, warmup_epochs=0, decay_epochs=(1, 3), decay_factor=0.5
    )
    assert [float(rate(step)) for step in range(5)] == [2, 1, 1, 0.5, 0.5]
    constant = make_schedule(lr=3, steps_per_epoch=1, warmup_epochs=0, decay_epochs=())
    assert float(constant(10**6)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr 0 must be above 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch 0"),
        ({"decay_epochs": (60, 30)}, r"decay_epochs \(60, 30\) must be increasing"),
        ({"decay_factor": 10}, "decay_factor 10"),
        ({"warmup_per": "step"}, "warmup_per is 'step'"),
        ({"warmup": "square"}, "warmup is 'square'; .* 'exponential'"),
        ({"decay": "cosine"}, "decay is 'cosine'; .* 'exponential' or 'cosine_restarts'"),
        ({"decay": "exponential"}, r"decay_epochs \(30, 60, 90\) are of decay 'steps'"),
        ({"decay": "cosine_restarts"}, r"of decay 'steps'; 'cosine_restarts' needs \(\)"),
        ({"cycle_epochs": 0}, "cycle_epochs 0 and cycle_growth 2 must be 1 or more"),
        ({"cycle_growth": 0}, "cycle_epochs 10 and cycle_growth 0 must be"),
        ({"decay_length": 0}, "decay_length 0 at least 1"),
    ],
)
def test_bad_schedules(options, message, unchecked):
    with pytest.raises(UserError, match=message):
        make_schedule(**{"steps_per_epoch": 5, **options})


PARAMS: dict[str, Any] = {
    "network": {
        "trunk": {"conv": {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}},
        "bn": {"scale": np.ones(3, np.float32), "bias": np.full(3, 0.5, np.float32)},
    },
    "objective": {"center": {"g": np.full((1, 2, 3), 0.25, np.float32)}},
}
SCHEDULE = {"warmup_epochs": 2, "warmup_per": "iteration", "decay_epochs": (3,)}


def gradient(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), PARAMS)


def make(sections, **options):
    groups = make_groups(sections)
    schedules = make_schedules(groups, steps_per_epoch=3, **SCHEDULE)
    return make_optimizer(groups, schedules, **options), schedules


def run(optimizer, steps, gradients=gradient):
    params, state = PARAMS, optimizer.init(PARAMS)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(params, state, gradients(step))
    return params


def flatten(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def run_torch(groups, steps, gradients=gradient, *, every=1, clip=None):
    """Parameters by path after some steps.

    `groups`: (name of an optimizer, keyword arguments, rate by step, paths of its parameters); in
    place of a name, what makes its class of `torch.optim`.
    """
    import torch

    flat = {path: torch.tensor(x, requires_grad=True) for path, x in flatten(PARAMS).items()}
    classes = [
        getattr(torch.optim, kind) if isinstance(kind, str) else kind(torch.optim)
        for kind, *_ in groups
    ]
    made = [
        (kind([flat[path] for path in paths], lr=1.0, **options), rate)
        for kind, (_, options, rate, paths) in zip(classes, groups, strict=True)
    ]
    for step in range(steps):
        for p, g in zip(flat.values(), jax.tree.leaves(gradients(step)), strict=True):
            p.grad = torch.from_numpy(g) / every + (0 if p.grad is None else p.grad)
        if (step + 1) % every == 0:
            if clip:
                network = [p for path, p in flat.items() if path.startswith("network")]
                torch.nn.utils.clip_grad_norm_(network, clip)
            for optimizer, rate in made:
                optimizer.param_groups[0]["lr"] = rate(step)
                optimizer.step()
            for p in flat.values():
                p.grad = None
    return {path: p.detach().numpy() for path, p in flat.items()}


def assert_close(ours, theirs):
    ours = flatten(ours)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


NETWORK = ("network/bn/bias", "network/bn/scale", "network/trunk/conv/kernel")
CENTERS = ("objective/center/g",)
KINDS = {
    "adam": ("Adam", {"weight_decay": 0.05}, {}),
    "adamw": ("AdamW", {"weight_decay": 0.05}, {}),
    "sgd": ("SGD", {"weight_decay": 0.05, "momentum": 0.9}, {"momentum": 0.9}),
    "nesterov": (
        "SGD",
        {"weight_decay": 0.05, "momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True},
    ),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"clip": 0.7}, {"every": 2, "clip": 0.7}])
def test_steps_equal_pytorchs(name, options, recorded):
    kind, theirs_only, ours_only = KINDS[name]
    optimizer, schedules = make(
        {
            "network": {
                "params": ("network",),
                "kind": "sgd" if name == "nesterov" else name,
                "lr": 0.1,
                "weight_decay": 0.05,
                **ours_only,
            },
            "centers": {"params": ("objective",), "kind": "sgd", "lr": 0.5, "scheduled": False},
        },
        clip_norm=options.get("clip"),
        accumulate_steps=options.get("every", 1),
    )
    groups = [
        (kind, theirs_only, lambda step: float(schedules["network"](step)), NETWORK),
        ("SGD", {}, lambda step: 0.5, CENTERS),
    ]
    theirs = recorded(lambda: run_torch(groups, 12, **options))
    assert_close(run(optimizer, 12), theirs)


def test_a_group_for_each_part_and_the_longest_path_wins(recorded):
    sections = {
        "rest": {"params": ("network",), "kind": "sgd", "lr": 0.1, "scheduled": False},
        "trunk": {"params": ("network/trunk",), "kind": "sgd", "lr": 0.01, "scheduled": False},
        "still": {"params": ("network/bn/scale", "objective"), "kind": "frozen"},
    }
    optimizer, schedules = make(sections)
    assert schedules.keys() == {"rest", "trunk"}
    groups: list[Any] = [
        ("SGD", {}, lambda step: 0.1, ("network/bn/bias",)),
        ("SGD", {}, lambda step: 0.01, ("network/trunk/conv/kernel",)),
    ]
    theirs = recorded(lambda: run_torch(groups, 5))
    ours = run(optimizer, 5)
    assert_close(ours, theirs)
    for frozen in (lambda t: t["network"]["bn"]["scale"], lambda t: t["objective"]):
        jax.tree.map(np.testing.assert_array_equal, frozen(ours), frozen(PARAMS))


def test_frozen_means_that_nothing_moves():
    """Not by decay, not by momentum."""
    group = {"params": ("",), "kind": "frozen", "weight_decay": 0.1, "momentum": 0.9}
    jax.tree.map(np.testing.assert_array_equal, run(make({"all": group})[0], 3), PARAMS)


@pytest.mark.parametrize(("kind", "theirs"), [("adam", "Adam"), ("adamw", "AdamW")])
def test_amsgrad_is_pytorchs(kind, theirs, recorded):
    """Gradients that shrink, so that the largest second moment is not the last."""

    def shrinking(step):
        return jax.tree.map(lambda x: x * np.float32(0.7**step), gradient(step))

    group = {"params": ("",), "kind": kind, "lr": 0.1, "weight_decay": 0.05, "b2": 0.9}
    options = {"weight_decay": 0.05, "betas": (0.9, 0.9), "amsgrad": True}
    optimizer, schedules = make({"all": {**group, "amsgrad": True}})
    rate = schedules["all"]
    every = (*NETWORK, *CENTERS)
    group_of_torch = (theirs, options, lambda step: float(rate(step)), every)
    expected = recorded(lambda: run_torch([group_of_torch], 20, shrinking))
    assert_close(run(optimizer, 20, shrinking), expected)
    plain = run(make({"all": group})[0], 20, shrinking)
    assert np.abs(plain["network"]["bn"]["bias"] - expected["network/bn/bias"]).max() > 0.01


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_change_of_b1_is_pytorchs(every, amsgrad, recorded):
    """From a training step on; PyTorch corrects the bias by the present beta alone."""
    group = {"params": ("",), "kind": "adam", "lr": 0.1, "amsgrad": amsgrad}
    changes = [[5, 0.5], [9, 0.2]]  # as read from JSON
    optimizer, _ = make(
        {"all": {**group, "scheduled": False, "b1_changes": changes}}, accumulate_steps=every
    )

    def make_changing(_):
        from torch.optim import Adam

        class Changing(Adam):
            updates = 0

            def step(self):
                last = every * self.updates + every - 1  # training step of the update
                b1 = 0.2 if last >= 9 else 0.5 if last >= 5 else 0.9
                self.param_groups[0]["betas"] = (b1, 0.999)
                self.updates += 1
                super().step()

        return Changing

    names = (*NETWORK, *CENTERS)
    groups = [(make_changing, {"amsgrad": amsgrad}, lambda step: 0.1, names)]
    expected = recorded(lambda: run_torch(groups, 15, every=every))
    assert_close(run(optimizer, 15), expected)
    constant = run(make({"all": {**group, "scheduled": False}}, accumulate_steps=every)[0], 15)
    assert np.abs(constant["network"]["bn"]["bias"] - expected["network/bn/bias"]).max() > 0.01


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_decay_of_kernels_only(kind):
    def zeros(_):
        return jax.tree.map(np.zeros_like, PARAMS)

    group = {"params": ("",), "kind": kind, "lr": 0.1, "weight_decay": 0.05}
    params = run(make({"all": {**group, "decay_norm_and_bias": False}})[0], 2, zeros)
    assert (params["network"]["trunk"]["conv"]["kernel"] != PARAMS["network"]["trunk"]["conv"]
            ["kernel"]).any()  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, params["network"]["bn"], PARAMS["network"]["bn"])
    params = run(make({"all": group})[0], 2, zeros)
    assert (params["network"]["bn"]["scale"] != 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lamb"}, "optimizer.all: kind is 'lamb'; expected 'adam'"),
        ({"weight_decay": -1.0}, "weight_decay -1"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"b1": 1.0}, "b1 1.0"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"b1_changes": ((5, 0.5), (5, 0.2))}, "b1_changes is .*increasing steps"),
        ({"b1_changes": ((5, 1.0),)}, "b1_changes is .*below 1"),
        ({"kind": "sgd", "b1_changes": ((5, 0.5),)}, "b1_changes is for .* kind is 'sgd'"),
        ({"kind": "sgd", "amsgrad": True}, "amsgrad is for kind 'adam' and 'adamw'; .* 'sgd'"),
        (
            {"learning_rate": 1.0},
            "optimizer.all has no field learning_rate; there are params, kind",
        ),
        ({"params": ()}, "params names no parameters"),
    ],
)
def test_what_is_no_group(change, message, unchecked):
    with pytest.raises(UserError, match=message):
        make_groups({"all": {"params": ("",), **change}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"a": ("network/trunk", "objective"), "b": ("network/bn/bias",)},
            r"no group of the optimizer matches the parameter network/bn/scale; .*network/trunk",
        ),
        (
            {"a": ("",), "b": ("network/backbone",)},
            "no parameter belongs to 'network/backbone' of the optimizer's group b; there are "
            "network/trunk, network/bn, objective/center",
        ),
        ({"a": ("network",), "b": ("network", "objective")}, "two groups .* same path"),
    ],
)
def test_groups_that_do_not_fit_the_parameters(sections, message):
    groups = make_groups({name: {"params": params} for name, params in sections.items()})
    with pytest.raises(UserError, match=message):
        label_params(PARAMS, groups)


def test_objectives_without_parameters_need_no_group_and_may_have_one():
    params = {"network": PARAMS["network"], "objective": {}}
    groups = make_groups({"a": {"params": ("network",)}, "b": {"params": ("objective",)}})
    assert set(jax.tree.leaves(label_params(params, groups))) == {"a"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip_norm": 0.0}, "clip_norm is 0.0"), ({"accumulate_steps": 0}, "accumulate_steps is 0")],
)
def test_bad_optimizers(options, message):
    with pytest.raises(UserError, match=message):
        make({"all": {"params": ("",)}}, **options)


def test_frozen_parameters_have_no_part_in_the_norm():
    """Clipping to 1 lets a gradient of norm 0.5 pass, however large that of the frozen ones is."""
    groups = make_groups(
        {
            "trunk": {"params": ("network/trunk",), "kind": "frozen"},
            "heads": {"params": ("network",), "kind": "sgd", "lr": 1.0, "weight_decay": 0.1},
        }
    )
    params = {
        "network": {"trunk": {"kernel": np.ones(3, "f4")}, "head": {"kernel": np.zeros(1, "f4")}},
        "objective": {},
    }

    def loss(params):
        network = stop_frozen(params, groups)["network"]
        return 100 * jnp.sum(network["trunk"]["kernel"]) + 0.5 * network["head"]["kernel"][0]

    gradients = jax.jit(jax.grad(loss))(params)
    np.testing.assert_array_equal(gradients["network"]["trunk"]["kernel"], 0)
    schedules = make_schedules(groups, steps_per_epoch=1, warmup_epochs=0, decay_epochs=())
    optimizer = make_optimizer(groups, schedules, clip_norm=1.0)
    updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)
    np.testing.assert_array_equal(updates["network"]["trunk"]["kernel"], 0)
    np.testing.assert_allclose(updates["network"]["head"]["kernel"], -0.5)

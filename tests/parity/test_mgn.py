"""MGN in JAX and in PyTorch: outputs, losses, gradients and steps of both variants."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import LABELS, NUM_CLASSES, difference, make_images, randomise, to_numpy, widen_gaps
from torch_mgn import TorchMGN, make_optimizer, total_loss

from configs import mgn
from mros_jax.losses import make_objective
from mros_jax.models import torch_weights
from mros_jax.parallel import AXIS
from mros_jax.systems.mgn import MGN
from mros_jax.training import optimizers
from mros_jax.training.state import make_state
from mros_jax.training.step import make_train_step


class Pair(NamedTuple):
    """One network in both frameworks, with the same weights, and what it is trained with."""

    theirs: TorchMGN
    ours: MGN
    variables: dict
    images: np.ndarray
    config: Any

    def to_float64(self):
        return self._replace(
            theirs=self.theirs.double(),
            ours=self.ours.clone(dtype=jnp.float64),
            variables=jax.tree.map(lambda x: np.asarray(x, np.float64), self.variables),
            images=self.images.astype(np.float64),
        )


def to_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def make_pair(layout, variant, *, monkeypatch=None):
    """Give both frameworks one network; with `monkeypatch`, after `widen_gaps`."""
    config = mgn.get_config(variant)
    fields = {**config.network, "trunk": layout}
    del fields["name"]
    ours = MGN(NUM_CLASSES, **fields)
    theirs = randomise(TorchMGN(NUM_CLASSES, layout, variant == "public"))
    images = make_images(len(LABELS), 96, 32)
    if monkeypatch is not None:
        widen_gaps(theirs, to_torch(images), monkeypatch)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), images[:2], train=False))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    variables = torch_weights.from_torch_state_dict(state, shapes)
    return Pair(theirs, ours, variables, images, config)


def check_outputs(ours, theirs, tolerance):
    for name, expected in theirs["maps"].items():
        assert difference(ours.maps[name].transpose(0, 3, 1, 2), to_numpy(expected)) <= tolerance
    for kind in ("z", "f"):
        for name, vectors in theirs[kind].items():
            expected = to_numpy(torch.stack(vectors, dim=1))
            actual = ours.embeddings[f"{kind}_{name}"]
            assert difference(actual, expected) <= tolerance, (kind, name)
    for name, heads in theirs["logits"].items():
        expected = to_numpy(torch.stack(heads, dim=1))
        assert difference(ours.logits[name], expected) <= tolerance, name
    assert difference(ours.descriptor, to_numpy(theirs["descriptor"])) <= tolerance


@pytest.mark.parametrize(
    ("layout", "variant"), [("tiny", ""), ("tiny", "public"), ("resnet50", "")]
)
def test_evaluation_and_export(layout, variant):
    pair = make_pair(layout, variant)
    images = pair.images[:4]
    with torch.no_grad():
        expected = pair.theirs.eval()(to_torch(images))
    outputs = jax.jit(lambda v, x: pair.ours.apply(v, x, train=False))(pair.variables, images)
    assert outputs.descriptor.shape == (4, 2048)
    check_outputs(outputs, expected, 1e-5)

    again = TorchMGN(NUM_CLASSES, layout, variant == "public")
    exported = torch_weights.to_torch_state_dict(pair.variables)
    again.load_state_dict({k: torch.from_numpy(v) for k, v in exported.items()}, strict=True)
    with torch.no_grad():
        actual = again.eval()(to_torch(images))
    assert torch.equal(actual["descriptor"], expected["descriptor"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def differentiate(network, make, variables, images):
    """((total, (terms, outputs, new statistics)), gradients)."""

    def loss(params):
        outputs, updated = network.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        total, terms = make()({}, outputs, jnp.asarray(LABELS))
        return total, (terms, outputs, updated["batch_stats"])

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def check_training(pair, tolerance, gradient_tolerance):
    """One step in train mode: outputs, running statistics, losses and every gradient by name."""
    theirs = pair.theirs.train()
    out = theirs(to_torch(pair.images))
    labels = torch.from_numpy(LABELS).long()
    total, terms = total_loss(out, labels, theirs.public)
    total.backward()

    make = functools.partial(make_objective, pair.config.objective.to_dict())
    (our_total, (our_terms, outputs, stats)), grads = differentiate(
        pair.ours, make, pair.variables, pair.images
    )
    check_outputs(outputs, out, tolerance)
    named = torch_weights.to_torch_state_dict({"params": grads, "batch_stats": stats})
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            assert difference(named[name], to_numpy(buffer)) <= tolerance, name
    assert difference(our_total, to_numpy(total)) <= gradient_tolerance
    assert set(our_terms) == set(terms)
    for name, term in terms.items():
        assert term > 0
        assert difference(our_terms[name], to_numpy(term)) <= gradient_tolerance, name
    for name, parameter in theirs.named_parameters():
        error = difference(named[name], to_numpy(parameter.grad))
        assert error <= gradient_tolerance, (name, error)


@pytest.mark.parametrize(
    ("layout", "variant"), [("tiny", ""), ("tiny", "public"), ("resnet50", "")]
)
def test_training_step(layout, variant, monkeypatch):
    check_training(make_pair(layout, variant, monkeypatch=monkeypatch), 1e-5, 1e-4)


@pytest.mark.parametrize(("layout", "variant"), [("tiny", ""), ("tiny", "public")])
def test_training_step_in_float64(layout, variant):
    with jax.enable_x64(True):
        check_training(make_pair(layout, variant).to_float64(), 1e-9, 1e-9)


def check_steps(pair, steps, tolerance):
    schedule = {**pair.config.schedule, "decay_epochs": (2, 4)}
    groups = optimizers.make_groups(pair.config.optimizer.to_dict())
    schedules = optimizers.make_schedules(groups, steps_per_epoch=1, **schedule)
    objective = make_objective(pair.config.objective.to_dict())
    optimizer = optimizers.make_optimizer(groups, schedules)
    of_one_device = make_train_step(
        pair.ours, objective, optimizer, augment=lambda images, keys: images, seed=0
    )
    step = jax.jit(jax.vmap(lambda s, b: of_one_device(s, None, b), (None, 0), axis_name=AXIS))
    state = make_state(pair.variables, {}, optimizer)

    theirs = pair.theirs.train()
    their_optimizer = make_optimizer(theirs.parameters(), theirs.public)
    start = {name: to_numpy(p).copy() for name, p in theirs.named_parameters()}
    labels = torch.from_numpy(LABELS).long()
    for i in range(steps):
        images = make_images(16, 96, 32, seed=i).astype(pair.images.dtype)
        batch = {"images": images[None], "labels": LABELS[None]}
        state, metrics = jax.tree.map(lambda x: x[0], step(state, batch))

        their_optimizer.param_groups[0]["lr"] = float(schedules["network"](i))
        their_optimizer.zero_grad()
        total, _ = total_loss(theirs(to_torch(images)), labels, theirs.public)
        total.backward()
        their_optimizer.step()
        assert difference(metrics["loss"], to_numpy(total)) <= tolerance
    named = torch_weights.to_torch_state_dict(
        {"params": state.params["network"], "batch_stats": state.batch_stats}
    )
    for name, parameter in theirs.named_parameters():
        moved = to_numpy(parameter) - start[name]
        assert np.abs(moved).max() > 0, name
        error = difference(named[name] - start[name], moved)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("variant", mgn.VARIANTS)
def test_five_steps(variant):
    """The step that training runs, against a loop in PyTorch; the rate falls after 2 and 4."""
    with jax.enable_x64(True):
        check_steps(make_pair("tiny", variant).to_float64(), 5, 1e-9)

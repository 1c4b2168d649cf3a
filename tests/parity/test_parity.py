"""The same network, losses and optimiser in JAX and in PyTorch: the numbers must agree.

One full ResNet-50 goes through outputs, loss and gradients; what needs many networks or many steps
uses a small one of the same code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mros_jax import config as configs
from mros_jax import losses, parallel
from mros_jax.losses import Objective, make_objective
from mros_jax.models import torch_weights
from mros_jax.systems.mros import MROS
from mros_jax.training import optimizers
from mros_jax.training.state import make_state
from mros_jax.training.step import make_train_step
from tests.parity.common import LABELS, NUM_CLASSES, difference, make_images
from tests.parity.harness import randomise, to_numpy, widen_gaps
from tests.parity.torch_mros import (
    TorchMROS,
    center_loss,
    stack_centers,
    total_loss,
    triplet_loss,
)


class Pair(NamedTuple):
    """One network in both frameworks, with the same weights, images and centers."""

    setting: str
    theirs: TorchMROS
    ours: MROS
    objective: Objective
    variables: dict[str, Any]
    own: dict[str, Any]  # parameters of the objective
    images: np.ndarray

    def torch_images(self):
        return torch.from_numpy(self.images).permute(0, 3, 1, 2)

    @property
    def centers(self):
        """(S, N, D)."""
        (centers,) = self.own["center"].values()
        return stack_centers(centers)


def make_pair(
    layout, setting="IV", height=96, width=32, last_stride=1, *, calm=0, monkeypatch=None
):
    """Give both frameworks one network; with `monkeypatch`, after `widen_gaps`."""
    theirs = randomise(TorchMROS(NUM_CLASSES, setting, layout, last_stride=last_stride), calm)
    config = configs.read("configs/mros.py", setting)
    config.network.trunk, config.network.last_stride = layout, last_stride
    ours = configs.make_network(config, NUM_CLASSES)
    assert isinstance(ours, MROS)
    objective = make_objective(config.objective.to_dict())
    images = make_images(len(LABELS), height, width)
    if monkeypatch is not None:
        widen_gaps(theirs, torch.from_numpy(images).permute(0, 3, 1, 2), monkeypatch)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), images[:2], train=False))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    variables = torch_weights.from_torch_state_dict(state, shapes)
    outputs = jax.jit(lambda v, x: ours.apply(v, x, train=False))(variables, images[:2])
    own = objective.init(jax.random.key(0), outputs, NUM_CLASSES)
    own = jax.tree.map(np.asarray, own)
    return Pair(setting, theirs, ours, objective, variables, own, images)


def check_outputs(ours, theirs, tolerance=1e-5):
    for name, stage in theirs["stages"].items():
        assert difference(ours.maps[name].transpose(0, 3, 1, 2), to_numpy(stage)) <= tolerance
    for kind in ("g", "h", "logits"):
        for level, stripes in theirs[kind].items():
            expected = to_numpy(torch.stack(stripes, dim=1))
            own = ours.logits[level] if kind == "logits" else ours.embeddings[f"{kind}_{level}"]
            assert difference(own, expected) <= tolerance, (kind, level)
    assert difference(ours.descriptor, to_numpy(theirs["descriptor"])) <= tolerance


def differentiate(pair):
    """((total, (parts, outputs, new statistics)), gradients of the network and of the centers)."""

    @jax.jit
    def differentiate_all(variables, own, images):
        def loss(params, own):
            outputs, updated = pair.ours.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            total, parts = pair.objective(own, outputs, jnp.asarray(LABELS))
            return total, (parts, outputs, updated["batch_stats"])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], own)

    return differentiate_all(pair.variables, pair.own, pair.images)


def check_training(pair, tolerance=1e-5, gradient_tolerance=1e-4, dtype=torch.float32):
    """One step in train mode: outputs, running statistics, losses and every gradient by name."""
    theirs = pair.theirs.to(dtype).train()
    centers = [torch.tensor(c, dtype=dtype, requires_grad=True) for c in pair.centers]
    out = theirs(pair.torch_images().to(dtype))
    total, parts = total_loss(out, torch.from_numpy(LABELS).long(), centers, pair.setting)
    total.backward()

    (our_total, (our_parts, outputs, stats)), (grads, own_grads) = differentiate(pair)
    check_outputs(outputs, out, tolerance)
    named = torch_weights.to_torch_state_dict({"params": grads, "batch_stats": stats})
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            assert difference(named[name], to_numpy(buffer)) <= tolerance, name
    assert difference(our_total, to_numpy(total)) <= gradient_tolerance
    for name, part in parts.items():
        assert difference(our_parts[name], to_numpy(part)) <= gradient_tolerance, name
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            error = difference(named[name], to_numpy(parameter.grad))
            assert error <= gradient_tolerance, name
            compared += 1
    assert compared == sum(p.requires_grad for p in theirs.parameters()) > 20
    (center_grads,) = own_grads["center"].values()
    for ours, center in zip(stack_centers(center_grads), centers, strict=True):
        # Ours is that of the unweighted term.
        assert difference(0.0005 * ours, to_numpy(center.grad)) <= gradient_tolerance


def test_resnet50_evaluation_and_round_trip(tmp_path):
    pair = make_pair("resnet50")
    images = pair.images[:4]
    with torch.no_grad():
        expected = pair.theirs.eval()(pair.torch_images()[:4])
    outputs = jax.jit(lambda v, x: pair.ours.apply(v, x, train=False))(pair.variables, images)
    assert outputs.descriptor.shape == (4, 15_360)
    check_outputs(outputs, expected)

    torch_weights.save_torch_state_dict(tmp_path / "mros.safetensors", pair.variables)
    again = TorchMROS(NUM_CLASSES)
    again.load_state_dict(load_file(tmp_path / "mros.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(
            again.eval()(pair.torch_images()[:4])["descriptor"], expected["descriptor"]
        )


def test_resnet50_training_step(monkeypatch):
    check_training(make_pair("resnet50", monkeypatch=monkeypatch))


@pytest.mark.parametrize(
    ("setting", "last_stride"), [("I", 1), ("II", 1), ("III", 1), ("IV", 1), ("IV", 2)]
)
def test_training_step_of_every_setting(setting, last_stride, monkeypatch):
    height = 96 * last_stride
    check_training(make_pair("tiny", setting, height, 32, last_stride, monkeypatch=monkeypatch))


def to_float64(pair):
    pair.theirs.double()
    return pair._replace(
        ours=pair.ours.clone(dtype=jnp.float64),
        variables=jax.tree.map(lambda x: np.asarray(x, np.float64), pair.variables),
        images=pair.images.astype(np.float64),
        own=jax.tree.map(lambda x: x.astype(np.float64), pair.own),
    )


@pytest.mark.parametrize(("layout", "setting"), [("tiny", "I"), ("tiny", "IV"), ("resnet50", "IV")])
def test_training_step_in_float64(layout, setting):
    """Without rounding at the ReLUs' corners nothing is left but arithmetic."""
    pair = make_pair(layout, setting)
    with jax.enable_x64(True):
        check_training(to_float64(pair), 1e-10, 1e-10, torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("margin", [0.3, None])
def test_metric_losses_and_their_gradients(margin, reduction):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((16, 40)).astype(np.float32)
    c = rng.standard_normal((NUM_CLASSES, 40)).astype(np.float32)
    tx, tc = torch.tensor(x, requires_grad=True), torch.tensor(c, requires_grad=True)
    labels = torch.from_numpy(LABELS).long()
    theirs = triplet_loss(tx, labels, margin, reduction)
    theirs.backward()
    ours, grad = jax.value_and_grad(losses.batch_hard_triplet)(
        jnp.asarray(x), jnp.asarray(LABELS), margin=margin, reduction=reduction
    )
    assert difference(ours, to_numpy(theirs)) <= 1e-5
    assert difference(grad, to_numpy(tx.grad)) <= 1e-4

    tx.grad = None
    theirs = center_loss(tx, labels, tc, reduction)
    theirs.backward()
    ours, grads = jax.value_and_grad(losses.center_loss, argnums=(0, 2))(
        jnp.asarray(x), jnp.asarray(LABELS), jnp.asarray(c), reduction=reduction
    )
    assert difference(ours, to_numpy(theirs)) <= 1e-5
    assert difference(grads[0], to_numpy(tx.grad)) <= 1e-4
    assert difference(grads[1], to_numpy(tc.grad)) <= 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient(smoothing):
    rng = np.random.default_rng(4)
    x = 3 * rng.standard_normal((16, NUM_CLASSES)).astype(np.float32)
    tx = torch.tensor(x, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        tx, torch.from_numpy(LABELS).long(), label_smoothing=smoothing
    )
    theirs.backward()
    ours, grad = jax.value_and_grad(losses.smoothed_cross_entropy)(
        jnp.asarray(x), jnp.asarray(LABELS), smoothing=smoothing
    )
    assert difference(ours, to_numpy(theirs)) <= 1e-5
    assert difference(grad, to_numpy(tx.grad)) <= 1e-4


def test_running_statistics_after_five_steps():
    pair = make_pair("tiny")
    apply = jax.jit(
        lambda v, x: pair.ours.apply(v, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    )
    variables, theirs = pair.variables, pair.theirs.train()
    for step in range(5):
        images = make_images(8, 96, 32, seed=step)
        variables = {**variables, "batch_stats": apply(variables, images)}
        with torch.no_grad():
            theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    named = torch_weights.to_torch_state_dict(variables)
    compared = [name for name, _ in theirs.named_buffers() if "running" in name]
    for name in compared:
        assert difference(named[name], to_numpy(theirs.get_buffer(name))) <= 1e-5, name
    assert len(compared) == 2 * (12 + 2 * 5)  # mean and variance; 12 in the trunk, 5 a level


def torch_rate(epoch):
    """The paper's schedule, written out: 10 epochs from 0.01 of 0.001, tenths after 30, 60, 90."""
    if epoch < 10:
        return 0.001 * (0.01 * (1 - epoch / 10) + epoch / 10)
    return 0.001 * 0.1 ** (epoch // 30)


def train_torch(pair, batches, name):
    model = pair.theirs.train()
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = kinds[name](weights, lr=0.001, weight_decay=5e-4)
    centers = [torch.tensor(c, requires_grad=True) for c in pair.centers]
    center_optimizer = torch.optim.SGD(centers, lr=0.5)
    labels, curve = torch.from_numpy(LABELS).long(), []
    for step, images in enumerate(batches):
        optimizer.param_groups[0]["lr"] = torch_rate(step // 2)
        optimizer.zero_grad()
        center_optimizer.zero_grad()
        out = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        total, _ = total_loss(out, labels, centers, pair.setting)
        total.backward()
        optimizer.step()
        for center in centers:
            center.grad /= 0.0005  # the public code's way: undo the weight beta
        center_optimizer.step()
        curve.append(total.item())
    return curve, [to_numpy(c) for c in centers]


def train_ours(pair, batches, name):
    """The step that training runs, on one device and images that are ready."""
    sections = configs.read("configs/mros.py").optimizer.to_dict()
    sections["network"]["kind"] = name
    groups = optimizers.make_groups(sections)
    schedules = optimizers.make_schedules(groups, steps_per_epoch=2)
    optimizer = optimizers.make_optimizer(groups, schedules)
    step = make_train_step(
        pair.ours, pair.objective, optimizer, augment=lambda images, keys: images, seed=0
    )
    devices = jax.devices()[:1]
    step = parallel.MappedStep(step, devices)
    state = parallel.replicate(make_state(pair.variables, pair.own, optimizer), devices)
    curve = []
    for images in batches:
        batch = parallel.split({"images": images, "labels": LABELS}, devices)
        state, metrics = step(state, None, batch)
        curve.append(float(metrics["loss"]))
    (centers,) = state.params["objective"]["center"].values()
    return curve, jax.device_get(state.eval_variables), stack_centers(np.asarray(centers))


def check_twenty_steps(pair, name, dtype, tolerance):
    batches = [make_images(16, 96, 32, seed=step % 4).astype(dtype) for step in range(20)]
    expected, expected_centers = train_torch(pair, batches, name)
    curve, variables, centers = train_ours(pair, batches, name)
    np.testing.assert_allclose(curve, expected, rtol=tolerance)
    assert curve[-1] < 0.9 * curve[0]
    named = torch_weights.to_torch_state_dict(variables)
    for key, parameter in pair.theirs.named_parameters():
        assert difference(named[key], to_numpy(parameter)) <= tolerance, key
        if key.startswith("neck") and key.endswith("bias"):
            assert not named[key].any()
    for ours, theirs in zip(centers, expected_centers, strict=True):
        assert difference(ours, theirs) <= tolerance


@pytest.mark.parametrize(("setting", "name"), [("IV", "adam"), ("II", "adam"), ("IV", "adamw")])
def test_twenty_steps_of_the_full_recipe(setting, name):
    check_twenty_steps(make_pair("tiny", setting, calm=16), name, np.float32, 1e-3)


def test_twenty_steps_in_float64():
    """All channels alive; only the learning rate is float32 in one and float64 in the other."""
    pair = make_pair("tiny")
    with jax.enable_x64(True):
        check_twenty_steps(to_float64(pair), "adam", np.float64, 1e-5)

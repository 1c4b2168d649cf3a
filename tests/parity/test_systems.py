"""Every system against a PyTorch network of its own, with the same weights.

A system is entered in `CASES`: what its config says on our side; a network, a loss, optimizers and
a schedule in PyTorch on the other.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from mros_jax.data.augment import example_keys
from mros_jax.losses import make_objective
from mros_jax.models import torch_weights
from mros_jax.models.heads import dropout
from mros_jax.parallel import AXIS
from mros_jax.training.optimizers import make_groups, make_schedules
from tests.parity import (
    torch_auto_reid,
    torch_dare,
    torch_gsrw,
    torch_hacnn,
    torch_mfbn,
    torch_pcb,
    torch_pcb_rpp,
    torch_spherereid,
    torch_strong,
    torch_tbn_plus,
    torch_trinet,
)
from tests.parity.common import (
    HEIGHT,
    LABELS,
    NUM_CLASSES,
    WIDTH,
    difference,
    differentiate,
    make_images,
    make_network_alone,
    read_stage,
    train_ours,
)
from tests.parity.harness import randomise, to_numpy, widen_gaps


class Case(NamedTuple):
    """A variant of a config, and the same in PyTorch.

    `theirs` makes the network of the config's fields and a number of identities.
    `changes` are fields of the network that differ from the config: dropout is tested by itself.
    `finish` is called between gradients and updates. `idle` are tensors that the loss does not
    depend on: their gradient is rounding, which Adam makes steps of, another one on each side.
    `stage` is the config's, where it has several. `trunk` is a small one.

    `remainders` are tensors whose gradient is what is left of sums that cancel, all of it or
    nearly; its error is measured against a hundredth of the network's largest gradient instead of
    its own size, which is rounding or little more. `reference` is the type in which PyTorch
    computes what our float32 is compared with; see `test_rounding`. `float32` bounds the error of
    float32's gradients: it is larger where many numbers cancel, as before Auto-ReID's attention.
    """

    file: str
    variant: str
    theirs: Callable[[Any, int], torch.nn.Module]
    loss: Callable[..., Any]
    optimizers: Callable[..., Any]
    rate: Callable[[int], float]
    changes: Mapping[str, Any] = MappingProxyType({})
    finish: Callable[[dict[str, Any]], None] = lambda own: None
    idle: tuple[str, ...] = ()
    stage: str = ""
    remainders: tuple[str, ...] = ()
    reference: torch.dtype = torch.float32
    trunk: str = "tiny"
    float32: float = 1e-4

    def read(self):
        return read_stage(self.file, self.variant, self.stage)


def _strong(variant, rate):
    return Case(
        "strong",
        variant,
        lambda fields, n: torch_strong.TorchStrong(n, fields.trunk, variant != "authors"),
        torch_strong.total_loss,
        torch_strong.make_optimizers,
        rate,
        finish=torch_strong.undo_weight,
    )


def _pcb(variant):
    return Case(
        "pcb",
        variant,
        lambda fields, n: torch_pcb.TorchPCB(n, fields.trunk, own=variant == "own"),
        torch_pcb.total_loss,
        torch_pcb.make_optimizers,
        torch_pcb.rate,
        changes={"dropout": 0.0},
    )


def _pcb_rpp(variant, stage):
    rates = variant or stage
    return Case(
        "pcb_rpp",
        variant,
        lambda fields, n: torch_pcb_rpp.TorchPCBRPP(
            n, fields.trunk, refined=stage != "stage1", authors=variant == "authors"
        ),
        torch_pcb.total_loss,
        lambda model, own: torch_pcb_rpp.make_optimizers(model, rates),
        lambda epoch: 0.1 if variant == "authors" and epoch >= 20 else torch_pcb.rate(epoch),
        changes={"dropout": 0.0, "part_dropout": 0.0},
        stage=stage,
    )


def _spherereid():
    return Case(
        "spherereid",
        "",
        lambda fields, n: torch_spherereid.TorchSphereReID(n, fields.trunk),
        torch_spherereid.total_loss,
        torch_spherereid.make_optimizers,
        torch_spherereid.rate,
        changes={"dropout": 0.0},
        # A batch normalization takes away again what these shift.
        idle=("neck.bias", "embedding.bias", "embedding_bn.running_mean"),
    )


def _trinet():
    return Case(
        "trinet",
        "",
        lambda fields, n: torch_trinet.TorchTriNet(fields.trunk),
        torch_trinet.total_loss,
        torch_trinet.make_optimizers,
        lambda epoch: torch_trinet.rate_at(7 * epoch),
        idle=("embedding.bias",),  # distances do not see it
    )


def _hacnn(variant, optimizers, rate, smoothing, align_corners=True):
    small = {"stem": 8, "widths": (32, 64, 96), "embedded": 32}
    names = tuple(torch_hacnn.TorchHACNN(NUM_CLASSES, **small).state_dict())
    return Case(
        "hacnn",
        variant,
        lambda fields, n: torch_hacnn.TorchHACNN(
            n, fields.stem, fields.widths, fields.embedded, align_corners=fields.align_corners
        ),
        torch_hacnn.make_loss(smoothing),
        optimizers,
        rate,
        changes={**small, "align_corners": align_corners},
        # SGD makes steps of a size with the gradient: all of them are compared.
        idle=torch_hacnn.find_idle(names) if variant == "paper" else (),
        remainders=torch_hacnn.find_remainders(names),
        reference=torch.float64,
    )


def _dare(variant, trunk):
    # A batch normalization takes the first away again, and distances do not see the second.
    idle = tuple(f"{layer}_t{i}.bias" for layer in ("reduction", "embedding") for i in range(1, 5))
    return Case(
        "dare",
        variant,
        lambda fields, n: torch_dare.TorchDaRe(fields.trunk),
        torch_dare.total_loss,
        torch_dare.make_optimizers,
        lambda epoch: torch_dare.rate_at(7 * epoch),
        idle=idle,
        remainders=idle,
        reference=torch.float64,
        trunk=trunk,
    )


def _gsrw(stage):
    walks = stage == "stage2"
    return Case(
        "gsrw",
        "",
        lambda fields, n: torch_gsrw.TorchGSRW(fields.trunk, alpha=0.95 if walks else 0.0),
        torch_gsrw.total_loss,
        torch_gsrw.make_adam if walks else torch_gsrw.make_sgd,
        lambda epoch: 1.0 if walks or epoch < 40 else 0.1,
        changes={"dropout": 0.0},
        stage=stage,
    )


def _mfbn():
    return Case(
        "mfbn",
        "",
        lambda fields, n: torch_mfbn.TorchMFBN(n, fields.trunk),
        torch_mfbn.total_loss,
        torch_mfbn.make_optimizers,
        torch_mfbn.rate,
    )


def _tbn_plus(depth):
    return Case(
        "tbn_plus",
        "",
        lambda fields, n: torch_tbn_plus.TorchTBNPlus(n, fields.trunk, fields.depth),
        torch_tbn_plus.total_loss,
        torch_tbn_plus.make_optimizers,
        torch_tbn_plus.rate,
        changes={"depth": depth},
    )


def _auto_reid(variant, genotype):
    small = {"cells": (1, 2, 1), "width": 6}
    idle = torch_auto_reid.find_idle(torch_auto_reid.TorchAutoReID(NUM_CLASSES, genotype, **small))
    return Case(
        "auto_reid",
        variant,
        lambda fields, n: torch_auto_reid.TorchAutoReID(n, genotype, fields.cells, fields.width),
        torch_auto_reid.total_loss,
        torch_auto_reid.make_optimizers,
        torch_auto_reid.rate,
        changes=small,
        idle=idle,
        remainders=idle,
        reference=torch.float64,
        float32=1e-3,
    )


CASES = {
    "auto_reid": _auto_reid("", torch_auto_reid.FULL),
    "auto_reid-reid_space": _auto_reid("reid_space", torch_auto_reid.REID_SPACE),
    "dare": _dare("", "tiny"),
    "dare-densenet201": _dare("densenet201", "tiny_densenet"),
    "gsrw": _gsrw("stage2"),
    "gsrw-stage1": _gsrw("stage1"),
    "hacnn": _hacnn("", torch_hacnn.make_sgd, torch_hacnn.rate, 0.1),
    "hacnn-paper": _hacnn("paper", torch_hacnn.make_adam, lambda epoch: 1.0, 0.0, False),
    "mfbn": _mfbn(),
    "strong": _strong("", torch_strong.rate),
    "strong-authors": _strong("authors", torch_strong.rate_of_authors),
    "pcb": _pcb(""),
    "pcb-own": _pcb("own"),
    "pcb_rpp": _pcb_rpp("", "stage3"),
    "pcb_rpp-authors": _pcb_rpp("authors", "stage2"),
    "spherereid": _spherereid(),
    "tbn_plus": _tbn_plus(2),  # the images' last map has 6 rows
    "trinet": _trinet(),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Pair(NamedTuple):
    """One network in both frameworks, with the same weights, images and parameters of the loss."""

    case: Case
    config: Any
    theirs: torch.nn.Module
    ours: Any
    objective: Any
    variables: dict[str, Any]
    own: dict[str, Any]
    images: np.ndarray

    def torch_own(self, dtype):
        flat = traverse_util.flatten_dict(self.own, sep="/")
        return {k: torch.tensor(v, dtype=dtype, requires_grad=True) for k, v in flat.items()}

    def to_float64(self):
        wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
        return self._replace(
            theirs=self.theirs.double(),
            ours=self.ours.clone(dtype=jnp.float64),
            variables=wide(self.variables),
            own=wide(self.own),
            images=wide(self.images),
        )


def to_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def make_pair(case, layout=None, *, height=HEIGHT, monkeypatch=None):
    """Give both frameworks one network; with `monkeypatch`, after `widen_gaps`."""
    layout = layout or case.trunk
    config = case.read()
    if "trunk" in config.network:
        config.network.trunk = layout
    config.network.update(case.changes)
    theirs = randomise(case.theirs(config.network, NUM_CLASSES))
    ours = make_network_alone(config)
    objective = make_objective(config.objective.to_dict())
    images = make_images(len(LABELS), height, WIDTH)
    if monkeypatch is not None:
        widen_gaps(theirs, to_torch(images), monkeypatch)
    init = functools.partial(ours.init_with_output, train=False)
    outputs, shapes = jax.eval_shape(init, jax.random.key(0), images)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    variables = torch_weights.from_torch_state_dict(state, shapes)
    outputs = jax.tree.map(lambda x: jnp.zeros(x.shape), outputs)
    own = jax.tree.map(np.asarray, objective.init(jax.random.key(1), outputs, NUM_CLASSES))
    return Pair(case, config, theirs, ours, objective, variables, own, images)


def check_outputs(ours, theirs, tolerance=1e-5):
    assert set(ours.maps) == set(theirs["maps"])
    for name, expected in theirs["maps"].items():
        value = ours.maps[name]
        value = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        assert difference(value, to_numpy(expected)) <= tolerance, name
    for kind in ("embeddings", "logits"):
        assert set(getattr(ours, kind)) == set(theirs[kind])
        for name, vectors in theirs[kind].items():
            expected = to_numpy(torch.stack(tuple(vectors), dim=1))
            assert difference(getattr(ours, kind)[name], expected) <= tolerance, (kind, name)
    assert difference(ours.descriptor, to_numpy(theirs["descriptor"])) <= tolerance


def check_training(pair, tolerance, gradient_tolerance, dtype, keys=None, dropped=()):
    """One step in train mode: outputs, running statistics, losses and every gradient by name."""
    run = jax.jit(functools.partial(differentiate, pair.ours, pair.objective))
    found = run(pair.variables, pair.own, pair.images, keys)
    check_found(pair, found, tolerance, gradient_tolerance, dtype, dropped)


def check_found(pair, found, tolerance, gradient_tolerance, dtype, dropped=()):
    """What `differentiate` has found of the pair's images, against PyTorch."""
    model, own = pair.theirs.to(dtype).train(), pair.torch_own(dtype)
    out = model(to_torch(pair.images).to(dtype), *dropped)
    total, terms = pair.case.loss(out, torch.from_numpy(LABELS).long(), own)
    total.backward()
    pair.case.finish(own)

    (our_total, (our_terms, outputs, stats)), (grads, own_grads) = found
    check_outputs(outputs, out, tolerance)
    named = torch_weights.to_torch_state_dict({"params": grads, "batch_stats": stats})
    for name, buffer in model.named_buffers():
        if "running" in name:
            assert difference(named[name], to_numpy(buffer)) <= tolerance, name
    assert difference(our_total, to_numpy(total)) <= gradient_tolerance
    assert set(our_terms) == set(terms)
    for name, term in terms.items():
        assert difference(our_terms[name], to_numpy(term)) <= gradient_tolerance, name
    theirs = {n: to_numpy(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, expected in theirs.items():
        # A bias before a batch normalization has gradient 0, and rounding in its place.
        weight = theirs[name.removesuffix("bias") + "weight"] if name.endswith("bias") else expected
        size = largest if name in pair.case.remainders else np.abs(weight).max()
        error = difference(named[name], expected, 0.01 * size)
        assert error <= gradient_tolerance, (name, error)
    assert len(theirs) > 20
    flat = traverse_util.flatten_dict(own_grads, sep="/")
    assert set(flat) == set(own)
    for name, tensor in own.items():
        assert difference(flat[name], to_numpy(tensor.grad)) <= gradient_tolerance, name


@each_case
def test_evaluation(case):
    pair = make_pair(case)
    with torch.no_grad():
        expected = pair.theirs.eval()(to_torch(pair.images))
    ours = jax.jit(functools.partial(pair.ours.apply, train=False))(pair.variables, pair.images)
    check_outputs(ours, expected)
    parts = pair.ours.parts(HEIGHT, WIDTH)
    assert sum(part.size for part in parts) == ours.descriptor.shape[1]


@each_case
def test_training_step(case, monkeypatch):
    pair = make_pair(case, monkeypatch=monkeypatch)
    check_training(pair, 1e-5, case.float32, case.reference)


def test_rounding(monkeypatch):
    """Why HA-CNN's float32 is compared with PyTorch's float64: PyTorch's float32 is further off.

    Each attention ends in a batch normalization of a product of two normalized maps, which makes
    the rounding of both larger: by the third level PyTorch in float32 is 1.4e-5 from itself in
    float64, beyond the bound of the comparison, and we are 5e-6 from it.
    """
    pair = make_pair(CASES["hacnn"], monkeypatch=monkeypatch)
    images, network = to_torch(pair.images), pair.theirs.train()
    with torch.no_grad():
        theirs = network(images)["maps"]
        exact = network.double()(images.double())["maps"]
    run = jax.jit(functools.partial(pair.ours.apply, train=True, mutable=["batch_stats"]))
    ours = run(pair.variables, pair.images)[0].maps

    def error(maps):
        return max(difference(maps[f"attention_x{i}"], exact[f"attention_x{i}"]) for i in (1, 2, 3))

    our_error = error({name: np.moveaxis(value, -1, 1) for name, value in ours.items()})
    assert our_error <= error(theirs)


@pytest.mark.parametrize(
    ("name", "trunk"),
    [("strong", "resnet50"), ("pcb", "resnet50"), ("dare-densenet201", "densenet201")],
)
def test_full_size(name, trunk):
    """The full-size trunk, with weights that went out to PyTorch's names and in again."""
    pair = make_pair(CASES[name], trunk)
    named = torch_weights.to_torch_state_dict(pair.variables)
    pair.theirs.load_state_dict({k: torch.from_numpy(v) for k, v in named.items()}, strict=True)
    with torch.no_grad():
        expected = pair.theirs.eval()(to_torch(pair.images[:2]))
    apply = jax.jit(functools.partial(pair.ours.apply, train=False))
    check_outputs(apply(pair.variables, pair.images[:2]), expected)


@each_case
def test_schedule(case):
    config = case.read()
    groups = make_groups(config.optimizer.to_dict())
    schedules = make_schedules(groups, steps_per_epoch=7, **config.schedule)
    epochs = range(config.num_steps // 7 or config.num_epochs)
    steps = 7 * np.asarray(epochs)
    for name, group in groups.items():
        factors = [case.rate(e) if group.scheduled else 1.0 for e in epochs]
        rates = jax.jit(jax.vmap(schedules[name]))(steps)
        np.testing.assert_allclose(rates, group.lr * np.array(factors), rtol=1e-6, err_msg=name)


def train_theirs(pair, batches, labels):
    model, own = pair.theirs.train(), pair.torch_own(torch.float64)
    optimizers = pair.case.optimizers(model, own)
    rates = [[group["lr"] for group in kind.param_groups] for kind, _ in optimizers]
    for epoch, images in enumerate(batches):
        for (optimizer, scheduled), bases in zip(optimizers, rates, strict=True):
            optimizer.zero_grad()
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                # Rates are float32 on our side; Adam magnifies what they differ in.
                factor = pair.case.rate(epoch) if scheduled else 1.0
                group["lr"] = float(np.float32(base * factor))
        total, _ = pair.case.loss(model(to_torch(images)), labels, own)
        total.backward()
        pair.case.finish(own)
        for optimizer, _ in optimizers:
            optimizer.step()
    return {name: to_numpy(tensor) for name, tensor in own.items()}


@each_case
def test_five_steps_in_float64(case):
    """Without rounding at the ReLUs' corners nothing is left but arithmetic.

    The first step's outputs and gradients are PyTorch's, and all five change parameters and
    running statistics alike.
    """
    with jax.enable_x64(True):
        pair = make_pair(case).to_float64()
        before = torch_weights.to_torch_state_dict(pair.variables)
        own_before = traverse_util.flatten_dict(pair.own, sep="/")
        batches = [
            make_images(len(LABELS), HEIGHT, WIDTH, seed=i).astype(np.float64) for i in range(5)
        ]
        fresh = pair._replace(theirs=copy.deepcopy(pair.theirs), images=batches[0])
        expected_own = train_theirs(pair, batches, torch.from_numpy(LABELS).long())
        variables, own, first = train_ours(pair, batches)
        check_found(fresh, first, 1e-9, 1e-9, torch.float64)
    after = torch_weights.to_torch_state_dict(variables)
    for name, value in pair.theirs.state_dict().items():
        if not name.endswith("num_batches_tracked") and name not in case.idle:
            start = before[name]
            error = difference(after[name] - start, to_numpy(value) - start)
            assert error <= 1e-6, (name, error)
    assert set(own) == set(expected_own)
    for name, value in expected_own.items():
        start = own_before[name]
        assert difference(own[name] - start, value - start) <= 1e-6, name


@pytest.mark.parametrize(("name", "vectors"), [("pcb", 6), ("spherereid", 1)])
def test_dropout_with_the_same_mask(name, vectors):
    """PyTorch gets the mask that our keys draw."""
    pair = make_pair(CASES[name]._replace(changes={"dropout": 0.5}))
    keys = example_keys(3, 5, jnp.arange(len(LABELS)))
    channels = pair.variables["params"]["embedding"]["kernel"].shape[0]
    ones = jnp.ones((len(LABELS), vectors, channels))
    mask = np.array(dropout(ones, 0.5, keys, train=True))
    assert set(np.unique(mask)) == {0.0, 2.0}
    assert abs(mask.mean() - 1) < 0.03
    with jax.enable_x64(True):
        dropped = torch.from_numpy(mask).double()
        check_training(pair.to_float64(), 1e-9, 1e-9, torch.float64, keys, (dropped,))


def test_both_dropouts_of_the_authors_part_pooling():
    """The vectors and the input of the part classifier have masks of their own."""
    pair = make_pair(
        CASES["pcb_rpp-authors"]._replace(changes={"dropout": 0.5, "part_dropout": 0.5})
    )
    keys = example_keys(3, 5, jnp.arange(len(LABELS)))
    channels = pair.variables["params"]["embedding"]["kernel"].shape[0]
    shapes = {0: (len(LABELS), 6, channels), 1: (len(LABELS), HEIGHT // 16, WIDTH // 16, channels)}
    vectors, columns = (
        np.array(dropout(jnp.ones(shape), 0.5, keys, train=True, salt=salt))
        for salt, shape in shapes.items()
    )
    masks = torch.from_numpy(vectors).double(), to_torch(columns).double()
    with jax.enable_x64(True):
        check_training(pair.to_float64(), 1e-9, 1e-9, torch.float64, keys, masks)


def test_dropout_in_the_heads_of_gsrw():
    """Each pair has its row's key, and masks of its own for all groups and heads."""
    pair = make_pair(CASES["gsrw"]._replace(changes={}))
    keys = example_keys(3, 5, jnp.arange(len(LABELS)))
    is_probe = np.arange(len(LABELS)) % 4 == 0
    heads, features = pair.variables["params"]["pairs"]["bn"]["scale"].shape
    size = (np.count_nonzero(~is_probe), heads, heads, features)  # gallery, groups, heads
    masks: dict[tuple[int, int], torch.Tensor] = {}
    for kind, own in enumerate((keys[is_probe], keys[~is_probe])):
        mask = np.array(dropout(jnp.ones((len(own), *size)), 0.8, own, train=True, salt=kind))
        assert abs(mask.mean() - 1) < 0.05
        masks |= {(i, kind): torch.from_numpy(mask[:, :, i]).double() for i in range(4)}
    with jax.enable_x64(True):
        check_training(pair.to_float64(), 1e-9, 1e-9, torch.float64, keys, (masks,))


def test_tree_of_three_levels():
    """As the config has it; the halves of a half."""
    with jax.enable_x64(True):
        pair = make_pair(_tbn_plus(3), height=64).to_float64()
        assert pair.images.shape[1] // 16 == 4
        check_training(pair, 1e-9, 1e-9, torch.float64)


def test_steps_across_the_edges_of_stages():
    """A new optimizer in every stage, on both sides; what is frozen keeps every bit."""
    with jax.enable_x64(True):
        state = variables = None
        for stage in ("stage1", "stage2", "stage3"):
            pair = make_pair(_pcb_rpp("", stage)).to_float64()
            if state is not None:
                pair.theirs.load_state_dict(state)
                pair = pair._replace(variables=variables)
            before = torch_weights.to_torch_state_dict(pair.variables)
            start = {
                name: to_numpy(value).copy() for name, value in pair.theirs.state_dict().items()
            }
            batches = [
                make_images(len(LABELS), HEIGHT, WIDTH, seed=i).astype(np.float64) for i in range(3)
            ]
            train_theirs(pair, batches, torch.from_numpy(LABELS).long())
            variables, _, _ = train_ours(pair, batches)
            state = pair.theirs.state_dict()
            after = torch_weights.to_torch_state_dict(variables)
            still = 0
            for name, value in state.items():
                if name.endswith("num_batches_tracked"):
                    continue
                moved = to_numpy(value) - start[name]
                if np.any(moved):
                    error = difference(after[name] - before[name], moved)
                    assert error <= 1e-6, (stage, name, error)
                else:
                    np.testing.assert_array_equal(after[name], before[name], err_msg=name)
                    still += 1
            parameters = len(list(pair.theirs.parameters()))
            assert still == {"stage1": 1, "stage2": parameters - 1, "stage3": 0}[stage]


def test_dropout_on_one_and_on_four_devices():
    x = np.ones((8, 6, 16), np.float32)

    def drop(x):
        positions = jax.lax.axis_index(AXIS) * len(x) + jnp.arange(len(x))
        return dropout(x, 0.5, example_keys(0, 9, positions), train=True)

    one, four = (
        jax.pmap(drop, AXIS, devices=jax.devices()[:n])(x.reshape(n, -1, 6, 16)) for n in (1, 4)
    )
    np.testing.assert_array_equal(one.reshape(x.shape), four.reshape(x.shape))
    assert len(np.unique(np.asarray(one[0]).reshape(8, -1), axis=0)) == 8  # one mask an example


def test_parts_of_pcb_have_unit_length():
    pair = make_pair(CASES["pcb"])
    out = jax.jit(functools.partial(pair.ours.apply, train=False))(pair.variables, pair.images)
    norms = np.linalg.norm(out.descriptor.reshape(len(LABELS), 6, -1), axis=2)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)

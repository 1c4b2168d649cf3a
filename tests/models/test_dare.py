"""What DaRe has of its own: exits and their cost, fusion, how it starts, its schedule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.config import read
from mros_jax.errors import UserError
from mros_jax.models.counting import count_multiply_adds
from mros_jax.systems.dare import DaRe
from mros_jax.training.optimizers import make_groups, make_schedules
from tests.training import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")

STAGES = ("stage1", "stage2", "stage3", "stage4")


@functools.cache
def start():
    network = DaRe(num_classes=3, trunk="tiny")
    images = jax.random.normal(jax.random.key(1), (2, 64, 32, 3))
    init = jax.jit(functools.partial(network.init_with_output, train=False))
    return init(jax.random.key(0), images)


def test_the_descriptor_is_the_weighted_sum_of_the_exits():
    outputs, variables = start()
    assert outputs.exits == STAGES
    named = outputs.descriptors()
    assert tuple(named) == (*STAGES, "descriptor")
    weights = np.asarray(variables["params"]["fusion"]["kernel"])[:, 0]
    expected = sum(w * np.asarray(named[name]) for w, name in zip(weights, STAGES, strict=True))
    np.testing.assert_allclose(named["descriptor"], expected, rtol=1e-4, atol=1e-6)
    for name in STAGES:
        np.testing.assert_array_equal(named[name], outputs.embeddings[name][:, 0])


def test_layers_start_as_pytorchs_do():
    """Uniform within 1 / sqrt(inputs); the four weights of the fusion within 1/2."""
    params = start()[1]["params"]
    for layer, inputs in (("reduction_t1", 16), ("reduction_t4", 128), ("embedding_t2", 1024)):
        kernel = np.asarray(params[layer]["kernel"])
        assert kernel.shape[0] == inputs
        limit = inputs**-0.5
        np.testing.assert_allclose([kernel.min(), kernel.max()], [-limit, limit], rtol=0.01)
        np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=0.02)  # of a uniform one
        assert not np.any(params[layer]["bias"])
    drawn = np.asarray(params["fusion"]["kernel"])
    assert drawn.shape == (4, 1)
    assert len(np.unique(drawn)) == 4
    assert np.abs(drawn).max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["tiny", "tiny_densenet"])
def test_multiply_adds_are_those_of_the_layers_that_an_exit_needs(trunk, torch):
    """PyTorch's layers that get a gradient from an exit, counted as they run."""
    from tests.parity.torch_dare import TorchDaRe

    model = TorchDaRe(trunk).eval()
    counts = {}

    def count(layer, inputs, output):
        # Every output adds up as many products as it has weights.
        counts[layer] = output[0].numel() * layer.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(count)
    out = model(torch.randn(1, 3, 96, 48))
    expected = {}
    named = {name: e for name, [e] in out["embeddings"].items()}
    for name, value in {**named, "descriptor": out["descriptor"]}.items():
        model.zero_grad()
        value.sum().backward(retain_graph=True)
        needed = [layer for layer in layers if layer.weight.grad is not None]
        expected[name] = sum(counts.get(layer, 4 * 128) for layer in needed)  # else the fusion
    assert count_multiply_adds(DaRe(num_classes=3, trunk=trunk), 96, 48) == expected


def test_multiply_adds_of_resnet50():
    """Those of the trunk are the usual 4.09 G of 224 x 224, scaled to 256 x 128."""
    counts = count_multiply_adds(DaRe(num_classes=3), 256, 128)
    heads = 1024 * 2048 + 1024 * 128
    assert counts["stage4"] - heads == round(4_087_136_256 * (256 * 128) / (224 * 224))
    assert counts["descriptor"] - counts["stage4"] == 1024 * (256 + 512 + 1024 + 3 * 128) + 4 * 128
    assert [counts[name] for name in STAGES] == sorted(counts[name] for name in STAGES)


def test_schedule_and_b1():
    config = read(ROOT / "configs" / "dare.py")
    groups = make_groups(config.optimizer.to_dict())
    schedules = make_schedules(groups, steps_per_epoch=41, **config.schedule)
    steps = [0, 29_999, 30_000, 45_000, 60_000]
    rates = [float(schedules["network"](step)) for step in steps]
    np.testing.assert_allclose(rates, [3e-4, 3e-4, 3e-4, 3e-4 * 0.001**0.5, 3e-7], rtol=1e-5)
    values = [float(groups["network"].b1_at(step)) for step in steps]
    np.testing.assert_allclose(values, [0.9, 0.9, 0.5, 0.5, 0.5], rtol=1e-6)


def test_variants():
    configs = {
        name: read(ROOT / "configs" / "dare.py", name or None)
        for name in ("", "no-erasing", "densenet201", "densenet201-no-erasing")
    }
    assert [config.network.trunk for config in configs.values()] == [
        "resnet50",
        "resnet50",
        "densenet201",
        "densenet201",
    ]
    assert [config.augment.erase for config in configs.values()] == [0.5, 0, 0.5, 0]


def test_fields_that_make_no_network():
    images = jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"embedded": 0}, "embedded 0; both must be 1 or more"),
        ({"trunk": "vgg"}, "trunk is 'vgg'"),
        ({"last_stride": 3}, "last_stride is 3"),
    )
    for fields, message in cases:
        network = DaRe(**{"num_classes": 3, "trunk": "tiny", **fields})
        with pytest.raises(UserError, match=message):
            jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)

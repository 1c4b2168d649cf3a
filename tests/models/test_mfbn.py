"""MFBN: branches that start alike, what each gets of those before it, its starts, bad input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from mros_jax.errors import UserError
from mros_jax.models import torch_weights, trunks
from mros_jax.models.outputs import Part
from mros_jax.models.resnet import TrunkSpec
from mros_jax.systems.mfbn import MFBN
from tests.recorded import draw

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = jax.random.normal(jax.random.key(3), (2, 96, 32, 3))
SMALL = TrunkSpec((1, 1, 2, 1), 8, "basic")  # with a block of layer3 in the tails
TAILS = ("tail_1", "tail_2", "tail_3")


def fill(module, **options):
    """Variables of a module of images, drawn by their names."""
    init = functools.partial(module.init, train=False, **options)
    shapes = jax.eval_shape(init, jax.random.key(0), IMAGES)
    flat = traverse_util.flatten_dict(shapes, sep="/")
    drawn = {name: draw(name, x.shape).astype(np.float32) for name, x in flat.items()}
    return traverse_util.unflatten_dict(drawn, sep="/")


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """MFBN after it is given a file as torchvision writes it, and what the file holds."""
    monkeypatch.setitem(trunks.TRUNKS, "small", SMALL)
    whole = fill(SMALL.make())
    path = tmp_path / "w.safetensors"
    save_file(torch_weights.to_torch_state_dict(whole), path)
    network = MFBN(num_classes=3, trunk="small", reduced=16)
    variables = torch_weights.load_imagenet(path, fill(network), network.torchvision_name)
    return network, variables, whole


def test_branches_start_alike_and_are_boosted(loaded):
    network, variables, whole = loaded
    rest = ("layer3_1", "layer4_0")
    for kind in ("params", "batch_stats"):
        expected = {name: whole[kind][name] for name in rest}
        for tail in TAILS:
            jax.tree.map(np.testing.assert_array_equal, variables[kind][tail], expected)
    # Attention without weights multiplies by 1/2, so that branch k gets k/2 times the trunk's map.
    for k in (1, 2, 3):
        attention = f"attention_{k}"
        variables["params"][attention] = jax.tree.map(np.zeros_like, variables["params"][attention])

    @jax.jit
    def run(variables):
        outputs = network.apply(variables, IMAGES, train=False)
        shared = outputs.maps["shared"]
        tail = SMALL.make(blocks=rest, stem=False)
        of_tail = {kind: {name: whole[kind][name] for name in rest} for kind in whole}
        stages: Any = [tail.apply(of_tail, shared * k / 2, train=False) for k in (1, 2, 3)]
        return outputs, shared, [x["t4"] for x in stages]

    outputs, shared, (b1, b2, b3) = run(variables)
    maps = outputs.maps
    for k in (1, 2, 3):
        np.testing.assert_allclose(maps[f"x{k}"], shared * k / 2, rtol=1e-6)
    for name, expected in (("q1", b1), ("q2", b2 + b1), ("q3", b3 + b2 + 2 * b1)):
        np.testing.assert_allclose(maps[name], expected, rtol=1e-4, atol=1e-4 * expected.max())
    assert b1.shape == (2, 6, 2, 64)

    q1, q2, q3 = (np.asarray(maps[f"q{k}"]) for k in (1, 2, 3))
    pieces = [q1, q2, q3, q2[:, :3], q2[:, 3:], q3[:, :2], q3[:, 2:4], q3[:, 4:]]
    z = np.stack([piece.mean((1, 2)) for piece in pieces], axis=1)
    np.testing.assert_allclose(outputs.embeddings["z"], z, rtol=1e-5, atol=1e-6)
    f = outputs.embeddings["f"]
    np.testing.assert_array_equal(outputs.descriptor, f.reshape(2, -1))
    assert (f < 0).any()  # leaky


def test_reductions_and_classifier_start_as_in_public_code():
    network = MFBN(num_classes=751, trunk="tiny")

    @jax.jit
    def start():
        params = network.init(jax.random.key(0), IMAGES, train=False)["params"]
        return params["reduction"], params["classifier"]

    reduction, classifier = start()
    assert reduction["kernel"].shape == (8, 128, 256)
    np.testing.assert_allclose(reduction["kernel"].std(), (2 / 128) ** 0.5, rtol=0.01)
    np.testing.assert_allclose(reduction["bn"]["scale"].mean(), 1, atol=2e-3)
    np.testing.assert_allclose(reduction["bn"]["scale"].std(), 0.02, rtol=0.1)
    np.testing.assert_array_equal(reduction["bn"]["bias"], 0)
    assert classifier["kernel"].shape == (1, 2048, 751)
    np.testing.assert_allclose(classifier["kernel"].std(), (2 / 751) ** 0.5, rtol=0.01)
    np.testing.assert_array_equal(classifier["bias"], 0)


def test_parts_are_in_the_codes_order():
    whole = (Part("global", 256),) * 3
    halves = (Part("part2", 256, 0, 1 / 2), Part("part2", 256, 1 / 2, 1))
    thirds = tuple(Part("part3", 256, i / 3, (i + 1) / 3) for i in range(3))
    assert MFBN(num_classes=2).parts(384, 128) == whole + halves + thirds


@pytest.mark.parametrize(
    ("fields", "height", "message"),
    [
        ({"stripes": ()}, 96, r"stripes are \(\)"),
        ({"stripes": (1, 0)}, 96, "num_stripes is 0"),
        ({"reduced": 0}, 96, "reduced 0 must be 1 or more"),
        ({"ratio": 7}, 96, "ratio is 7; it must divide 64 channels"),
        ({"trunk": "tiny_densenet"}, 96, "needs a ResNet"),
        ({}, 64, "give a q3 of height 4.* use images of height 48 or 96"),
    ],
)
def test_bad_input(fields, height, message, unchecked):
    network = MFBN(**{"num_classes": 2, "trunk": "tiny", **fields})
    images = jnp.zeros((1, height, 32, 3))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import mgn
from mros_jax.errors import UserError
from mros_jax.losses import make_objective
from mros_jax.models import torch_weights
from mros_jax.models.outputs import Part
from mros_jax.models.trunks import TRUNKS
from mros_jax.systems.mgn import MGN

LABELS = jnp.asarray([0, 0, 1, 1])
IMAGES = jax.random.normal(jax.random.key(3), (4, 96, 32, 3))
TAILS = ("tail_global", "tail_part2", "tail_part3")


def draw(network, seed):
    """Random parameters, and statistics of 1."""
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, train=False))
    rng = np.random.default_rng(seed)
    return {
        "params": jax.tree.map(
            lambda x: rng.uniform(-0.5, 0.5, x.shape).astype(np.float32), shapes["params"]
        ),
        "batch_stats": jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes["batch_stats"]),
    }


def load(trunk, path):
    """MGN before and after it is given a file as torchvision writes it, and what the file holds."""
    whole = draw(TRUNKS[trunk].make(), 1)
    state = torch_weights.to_torch_state_dict(whole)
    save_file(state | {"fc.weight": np.ones((10, 512), np.float32)}, path)
    network = MGN(num_classes=2, trunk=trunk)
    start = draw(network, 2)
    return network, start, torch_weights.load_imagenet(path, start, network.torchvision_name), whole


def test_imagenet_weights_fill_the_trunk_once_and_every_tail(tmp_path):
    network, start, loaded, whole = load("resnet18", tmp_path / "w.safetensors")
    blocks = {"layer3_1", "layer4_0", "layer4_1"}
    for kind in ("params", "batch_stats"):
        for tail in TAILS:
            assert loaded[kind][tail].keys() == blocks
        for piece in ("trunk", *TAILS):
            expected = {name: whole[kind][name] for name in loaded[kind][piece]}
            jax.tree.map(np.testing.assert_array_equal, loaded[kind][piece], expected)
        assert loaded[kind]["trunk"].keys() == whole[kind].keys() - blocks
        for name in loaded[kind].keys() - {"trunk", *TAILS}:
            jax.tree.map(np.testing.assert_array_equal, loaded[kind][name], start[kind][name])

    outputs = jax.jit(lambda v: network.apply(v, IMAGES, train=False))(loaded)
    for stride, names in ((2, ("t4_global",)), (1, ("t4_part2", "t4_part3"))):
        trunk = TRUNKS["resnet18"].make(last_stride=stride)
        t4 = jax.jit(lambda v, trunk=trunk: trunk.apply(v, IMAGES, train=False)["t4"])(whole)
        assert t4.max() > 0
        for name in names:
            np.testing.assert_allclose(outputs.maps[name], t4, rtol=1e-5, atol=1e-5 * t4.max())
    for i, name in enumerate(("t4_global", "t4_part2", "t4_part3")):
        z = outputs.embeddings["z_global"][:, i]
        np.testing.assert_array_equal(z, outputs.maps[name].max(axis=(1, 2)))
    for i, name in ((1, "z_part2"), (2, "z_part3")):
        z = outputs.embeddings["z_global"][:, i]
        np.testing.assert_array_equal(outputs.embeddings[name].max(axis=1), z)


@pytest.mark.slow
def test_tails_that_start_alike_learn_different_things(tmp_path):
    network, _, variables, _ = load("tiny", tmp_path / "w.safetensors")
    objective = make_objective(mgn.get_config().objective.to_dict())

    @jax.jit
    def gradient(params):
        def loss(params):
            of = {**variables, "params": params}
            outputs, _ = network.apply(of, IMAGES, train=True, mutable=["batch_stats"])
            return objective({}, outputs, LABELS)[0]

        return jax.grad(loss)(params)

    slopes = gradient(variables["params"])
    kernels = [slopes[tail]["layer4_0"]["conv1"]["kernel"] for tail in TAILS]
    largest = max(float(jnp.abs(k).max()) for k in kernels)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert jnp.abs(kernels[a] - kernels[b]).max() > 0.1 * largest


def test_parts_are_in_the_papers_order():
    whole = (Part("global", 256),) * 3
    halves = (Part("part2", 256, 0, 1 / 2), Part("part2", 256, 1 / 2, 1))
    thirds = tuple(Part("part3", 256, i / 3, (i + 1) / 3) for i in range(3))
    assert MGN(num_classes=2).parts(384, 128) == whole + halves + thirds


@pytest.mark.parametrize(
    ("fields", "height", "message"),
    [
        ({"stripes": (2, 2)}, 96, r"stripes are \(2, 2\); expected other numbers"),
        ({"stripes": (0,)}, 96, r"stripes are \(0,\)"),
        ({"global_heads": "g"}, 96, "global_heads is 'g'; it must be 'z' or 'f'"),
        ({"reduced": 0}, 96, "reduced 0 must be 1 or more"),
        ({"trunk": "resnet5"}, 96, "must be one of tiny, resnet18"),
        ({}, 64, r"give a part3 of height 4.* use images of height 48 or 96"),
        ({"stripes": (2,)}, 48, r"give a part2 of height 3.* height 32 or 64"),
    ],
)
def test_bad_input(fields, height, message, unchecked):
    network = MGN(**{"num_classes": 2, "trunk": "tiny", **fields})
    images = jnp.zeros((1, height, 32, 3))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))

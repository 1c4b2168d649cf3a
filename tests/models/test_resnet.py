"""Where other codes pool and stride in a ResNet, and what that leaves unchanged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.models.resnet import NonLocal, TrunkSpec, max_pool_to_end
from mros_jax.systems.strong import StrongBaseline
from mros_jax.systems.trinet import TriNet

SPEC = TrunkSpec((2, 1, 2, 1), 16, "bottleneck")
IMAGES = jnp.zeros((2, 64, 32, 3), jnp.float32)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def shape_maps(**fields):
    init = SPEC.make(**fields).init_with_output
    maps, _ = jax.eval_shape(lambda: init(jax.random.key(0), IMAGES, train=False))
    return {name: x.shape[1:3] for name, x in maps.items()}


def test_strides_move_between_stages_and_the_last_map_keeps_its_size():
    usual = {"t1": (16, 8), "t2": (8, 4), "t3": (4, 2), "t4": (2, 1)}
    assert shape_maps(last_stride=2) == usual
    assert shape_maps(last_stride=2, strides="1x1", stem_pool="end") == usual
    earlier = {"t1": (8, 4), "t2": (4, 2), "t3": (2, 1), "t4": (2, 1)}
    assert shape_maps(last_stride=2, strides="last") == earlier
    assert shape_maps(last_stride=1, strides="last") == earlier | {"t3": (4, 2), "t4": (4, 2)}


def test_the_stem_pools_to_the_end():
    """A window begins with the pixel of its own row and column, doubled."""
    x = jax.random.normal(jax.random.key(0), (1, 6, 5, 2))
    windows = [
        [x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in (0, 1)] for i in range(3)
    ]
    np.testing.assert_array_equal(max_pool_to_end(x)[0], np.array(windows))


def test_a_non_local_block_adds_what_all_places_say():
    """Against a loop over pairs of places; it starts as nothing."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    block = NonLocal()
    variables = block.init(jax.random.key(1), x, train=False)
    np.testing.assert_array_equal(block.apply(variables, x, train=False), x)
    variables["params"]["bn"]["scale"] = jnp.arange(1.0, 5.0)
    made: Any = block.apply(variables, x, train=False)

    params = jax.tree.map(np.float64, variables["params"])
    places = np.float64(x).reshape(2, 6, 4)
    theta, phi, g = (
        places @ params[name]["kernel"][0, 0, :, 0] + params[name]["bias"]
        for name in ("theta", "phi", "g")
    )
    said = np.array(
        [
            [sum(theta[b, i] * phi[b, j] * g[b, j] for j in range(6)) / 6 for i in range(6)]
            for b in range(2)
        ]
    )
    y = said[..., None] * params["out"]["kernel"][0, 0, 0] + params["out"]["bias"]
    expected = places + y * np.arange(1, 5) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(made.reshape(2, 6, 4), expected, rtol=1e-5, atol=1e-6)


def test_imagenet_has_no_non_local_blocks():
    model = StrongBaseline(num_classes=3, trunk="tiny", non_local=("layer2_0",))
    assert model.torchvision_name(("trunk", "nonlocal_layer2_0", "g")) is None
    assert model.torchvision_name(("trunk", "layer2_0", "conv1")) == "layer2.0.conv1"
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
    assert "nonlocal_layer2_0" in shapes["params"]["trunk"]


@pytest.mark.parametrize(
    ("network", "field", "value"),
    [
        (StrongBaseline, "stem_pool", "left"),
        (StrongBaseline, "pooling", "max"),
        (StrongBaseline, "descriptor", "f"),
        (TriNet, "strides", "5x5"),
    ],
)
def test_fields_that_make_no_network_are_refused(network, field, value):
    model = network(num_classes=3, trunk="tiny", **{field: value})
    with pytest.raises(UserError, match=f"{field} is '{value}'; expected one of"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))


def test_a_densenet_has_no_such_fields():
    model = StrongBaseline(num_classes=3, trunk="tiny_densenet", stem_relu=False)
    with pytest.raises(UserError, match="needs a ResNet"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))


@pytest.mark.slow
def test_a_plain_baseline_is_trained_without_neck():
    """Its classifier sees the pooled feature, which is the descriptor; all parameters move."""
    model = StrongBaseline(num_classes=3, trunk="tiny", neck=False, head_bias=True, pooling="gem")
    images = np.random.default_rng(0).standard_normal((4, 64, 32, 3)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    assert set(variables["params"]) == {"trunk", "gem", "classifier"}

    def loss(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        assert outputs.descriptor.shape == (4, 128)
        return -jax.nn.log_softmax(outputs.scores("f_i")[:, 0])[jnp.arange(4), 0].sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))

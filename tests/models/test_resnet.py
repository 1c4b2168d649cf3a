"""Where other codes pool and stride in a ResNet, and what that leaves unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mros_jax.errors import UserError
from mros_jax.models.resnet import TrunkSpec, max_pool_to_end
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

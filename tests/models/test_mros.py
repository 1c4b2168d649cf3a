import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mros_jax.config import make_network, read
from mros_jax.errors import UserError
from mros_jax.models.resnet import BatchNorm, Conv
from mros_jax.models.trunks import TRUNKS
from mros_jax.systems.mros import MROS
from tests.recorded import draw

apply = jax.jit(
    lambda model, variables, images: model.apply(variables, images, train=False), static_argnums=0
)
train = jax.jit(
    lambda model, variables, images: model.apply(
        variables, images, train=True, mutable=["batch_stats"]
    ),
    static_argnums=0,
)
IMAGES = np.random.default_rng(0).standard_normal((4, 96, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
    """A network and variables that NumPy draws: to compile the initializers takes longer."""
    model = MROS(num_classes=5, trunk="tiny")
    variables, _ = shapes(model, 96, 32)
    flat = traverse_util.flatten_dict(variables, sep="/")
    drawn = {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in flat.items()}
    return model, traverse_util.unflatten_dict(drawn, sep="/")


def shapes(model, height, width):
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return variables, jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)


def test_full_model_has_the_papers_sizes():
    _, outputs = shapes(MROS(num_classes=751), 384, 128)
    assert outputs.maps["t3"].shape == (2, 24, 8, 1024)
    assert outputs.maps["t4"].shape == (2, 24, 8, 2048)
    assert outputs.embeddings["g_t3"].shape == (2, 5, 1024)
    assert outputs.embeddings["h_t3"].shape == (2, 5, 1024)
    assert outputs.logits["t4"].shape == (2, 5, 751)
    assert outputs.descriptor.shape == (2, 15_360)


@pytest.mark.parametrize(
    ("setting", "size", "levels"),
    [("I", 6 * 2048, ["t4"]), ("II", 10_240, ["t4"]), ("III", 10_240, ["t4"])],
)
def test_settings(setting, size, levels):
    model = make_network(read("configs/mros.py", setting), 7)
    _, outputs = shapes(model, 384, 128)
    assert outputs.descriptor.shape == (2, size)
    assert list(outputs.logits) == levels


def test_parts_are_the_stripes():
    parts = MROS(num_classes=5, num_stripes=4).parts(384, 128)
    assert [part.group for part in parts] == ["t3"] * 3 + ["t4"] * 3
    assert [part.size for part in parts] == [1024] * 3 + [2048] * 3
    assert [(part.top, part.bottom) for part in parts[:3]] == [(0, 0.5), (0.25, 0.75), (0.5, 1)]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.177), ("resnet34", 21.285), ("resnet50", 23.508), ("resnet101", 42.500),
     ("resnet152", 58.144)],
)  # fmt: skip
def test_trunks_have_torchvisions_number_of_parameters(name, millions):
    model = TRUNKS[name].make()
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    assert count / 1e6 == pytest.approx(millions, abs=6e-4)


def test_last_stride():
    _, outputs = shapes(MROS(num_classes=7, last_stride=2), 384, 128)
    assert outputs.maps["t4"].shape == (2, 12, 4, 2048)


def test_descriptor_order(tiny):
    model, variables = tiny
    outputs = apply(model, variables, IMAGES)
    parts = [outputs.embeddings[f"g_{level}"][:, i] for level in ("t3", "t4") for i in range(5)]
    np.testing.assert_array_equal(outputs.descriptor, jnp.concatenate(parts, axis=1))


def test_neck_bias_is_fixed_unless_asked_for(tiny):
    _, variables = tiny
    assert set(variables["params"]["neck_t3"]) == {"scale"}
    model = MROS(num_classes=5, trunk="tiny", neck_bias=True)
    variables, _ = shapes(model, 96, 32)
    assert set(variables["params"]["neck_t3"]) == {"scale", "bias"}


def test_bfloat16_computes_in_half_and_keeps_float32(tiny):
    model, variables = tiny
    half = model.clone(dtype=jnp.bfloat16)
    outputs, updated = train(half, variables, IMAGES)
    assert outputs.maps["t4"].dtype == jnp.bfloat16
    for x in (*outputs.embeddings.values(), *outputs.logits.values(), outputs.descriptor):
        assert x.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    initial, _ = shapes(half, 96, 32)
    assert {x.dtype for x in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    full = apply(model, variables, IMAGES).descriptor
    close = apply(half, variables, IMAGES).descriptor
    assert 0 < jnp.abs(close - full).max() < 0.03 * jnp.abs(full).max()


def test_training_changes_the_statistics_that_evaluation_uses(tiny):
    model, variables = tiny
    _, updated = train(model, variables, IMAGES)
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))
    rebound = {**variables, "batch_stats": after}
    outputs, other = apply(model, variables, IMAGES), apply(model, rebound, IMAGES)
    assert jnp.abs(outputs.descriptor - other.descriptor).max() > 0.01


def test_running_statistics_are_unbiased_over_all_devices():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    layer = BatchNorm(axis_name="d")
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
    }

    def step(x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    for devices in (2, 4):
        parts = x.reshape(devices, -1, 3)
        stats = jax.pmap(step, axis_name="d", devices=jax.devices()[:devices])(parts)
        np.testing.assert_allclose(stats["mean"][0], 0.1 * x.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats["var"][1], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_is_a_convolution(stride):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 3)), jnp.float32)
    layer = Conv(6, 1, stride)
    variables = layer.init(jax.random.key(0), x)
    expected = jax.lax.conv_general_dilated(
        x, variables["params"]["kernel"], (stride, stride), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    ours = np.asarray(layer.apply(variables, x))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 100, 32, 3), np.float32), "height 100 .* t3 of height 7.*height 96 or 192"),
        (np.zeros((2, 64, 32, 3), np.float32), r"height 96 \(multiples of 96\)"),
        (np.zeros((2, 96, 32, 1), np.float32), r"\(2, 96, 32, 1\); expected \(B, H, W, 3\)"),
        (np.zeros((96, 32, 3), np.float32), "expected"),
        (np.zeros((2, 96, 32, 3), np.uint8), "uint8; expected normalized"),
    ],
)
def test_wrong_images(tiny, images, message):
    model, variables = tiny
    with pytest.raises(UserError, match=message):
        apply(model, variables, images)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"levels": ("t2",)}, "levels are .*expected one or both"),
        ({"trunk": "vgg"}, "trunk is 'vgg'; it must be one of tiny, resnet18"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"last_stride": 3}, "last_stride is 3"),
    ],
)
def test_wrong_fields(field, message):
    model = MROS(**{"num_classes": 5, "trunk": "tiny", **field})
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))


def test_wrong_number_of_classes_is_an_error(tiny):
    _, variables = tiny
    message = r'(?=.*\(5, 64, 5\)).*"kernel"'
    with pytest.raises(flax.errors.ScopeParamShapeError, match=message):
        apply(MROS(num_classes=6, trunk="tiny"), variables, IMAGES)


def test_one_image_has_no_batch_statistics(tiny):
    model, variables = tiny
    with pytest.raises(ValueError, match="two or more images"):
        train(model, variables, IMAGES[:1])


def test_variables_may_be_numpy(tiny):
    model, variables = tiny
    loaded = jax.tree.map(np.asarray, variables)
    outputs = jax.jit(lambda: model.apply(loaded, IMAGES, train=False))()
    expected = apply(model, variables, IMAGES).descriptor
    np.testing.assert_allclose(outputs.descriptor, expected, rtol=1e-4, atol=1e-5)

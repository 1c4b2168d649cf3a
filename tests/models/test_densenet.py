"""DenseNet trunks: sizes, arithmetic, torchvision's names in both of their forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mros_jax.errors import UserError
from mros_jax.models import torch_weights
from mros_jax.models.resnet import torchvision_name
from mros_jax.models.trunks import TRUNKS, find_resnet, find_trunk
from tests.parity.common import difference, make_images

LEVELS = ("t1", "t2", "t3", "t4")
# Of torchvision's networks without their classifiers.
NUM_PARAMETERS = {"densenet121": 6_953_856, "densenet201": 18_092_928}


def shape(name, height=256, width=128, **fields):
    model = TRUNKS[name].make(**fields)
    image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    init = functools.partial(model.init_with_output, train=False)
    return model, *jax.eval_shape(init, jax.random.key(0), image)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_torchvisions_number_of_parameters(name):
    _, _, variables = shape(name)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert count == NUM_PARAMETERS[name]


@pytest.mark.parametrize("last_stride", [1, 2])
def test_sizes_of_stages_are_those_that_the_spec_states(last_stride):
    for name in ("tiny_densenet", "tiny"):
        spec = TRUNKS[name]
        _, maps, _ = shape(name, last_stride=last_stride)
        assert tuple(maps) == LEVELS
        for level in LEVELS:
            stride = spec.stride(level, last_stride)
            expected = (2, 256 // stride, 128 // stride, spec.channels(level))
            assert maps[level].shape == expected


def test_channels_of_densenet201():
    spec = TRUNKS["densenet201"]
    assert [spec.channels(level) for level in LEVELS] == [256, 512, 1792, 1920]
    assert [spec.activated(level) for level in LEVELS] == [False, False, False, True]


def start_from(theirs, name, **fields):
    model, _, variables = shape(name, 96, 32, **fields)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    return model, torch_weights.from_torch_state_dict(state, variables)


def make_theirs(last_stride=1):
    from tests.parity.harness import randomise
    from tests.parity.torch_densenet import DenseNet

    return randomise(DenseNet("tiny_densenet", last_stride))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("height", "width", "last_stride"), [(112, 54, 2), (96, 32, 1)])
def test_stages_equal_pytorchs(height, width, last_stride, train, torch):
    """Also where maps of odd height and width are halved; in float64, nothing but arithmetic."""
    theirs = make_theirs(last_stride).train(train).double()
    model, variables = start_from(theirs, "tiny_densenet", last_stride=last_stride)
    images = make_images(4, height, width).astype(np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        model = model.clone(dtype=jnp.float64)
        run = jax.jit(functools.partial(model.apply, train=train, mutable=["batch_stats"]))
        maps, updated = run(wide, images)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    for level in LEVELS:
        ours = maps[level].transpose(0, 3, 1, 2)
        assert difference(ours, expected[level].numpy()) <= 1e-9, level
    if train:
        named = torch_weights.to_torch_state_dict({**wide, **updated})
        for name, value in theirs.state_dict().items():
            assert difference(named[name], value.numpy()) <= 1e-9 or "tracked" in name, name


def test_half_precision_keeps_float32_statistics():
    _, maps, variables = shape("tiny_densenet", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {x.dtype for x in maps.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.usefixtures("quick_compilation")
def test_kernels_start_with_the_variance_of_their_inputs():
    model = TRUNKS["tiny_densenet"].make()
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]["features"]
    kernel = np.asarray(params["denseblock2"]["denselayer2"]["conv2"]["kernel"])
    np.testing.assert_allclose(kernel.std(), (2 / np.prod(kernel.shape[:3])) ** 0.5, rtol=0.05)


def old_name(name):
    """As in the files that torchvision publishes."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)


@pytest.mark.slow
@pytest.mark.parametrize("rename", [str, old_name])
@pytest.mark.usefixtures("torch")
def test_both_forms_of_torchvisions_names_are_read(rename, tmp_path):
    theirs = make_theirs()
    _, expected = start_from(theirs, "tiny_densenet")
    state = {rename(k): v.numpy() for k, v in theirs.state_dict().items() if "tracked" not in k}
    assert (rename is old_name) == any(".norm.1." in name for name in state)
    state |= {"classifier.weight": np.ones((10, 23)), "classifier.bias": np.ones(10)}
    save_file(state, tmp_path / "densenet.safetensors")
    empty = jax.tree.map(np.zeros_like, expected)
    load = functools.partial(torch_weights.load_imagenet, tmp_path / "densenet.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(empty, torchvision_name), expected)


def test_weights_of_another_kind_of_trunk(tmp_path):
    save_file({"conv1.weight": np.ones((16, 3, 7, 7))}, tmp_path / "resnet.safetensors")
    _, _, variables = shape("tiny_densenet")
    with pytest.raises(UserError, match=r"(?s)missing.*features\.conv0.*unexpected.*conv1\.weight"):
        torch_weights.load_imagenet(tmp_path / "resnet.safetensors", variables, torchvision_name)


def test_unknown_trunks():
    with pytest.raises(UserError, match=r"trunk is 'densenet'; .*resnet50.*densenet201"):
        find_trunk("densenet")
    with pytest.raises(UserError, match=r"trunk is 'densenet201'; this network needs a ResNet: t"):
        find_resnet("densenet201")
    with pytest.raises(UserError, match="last_stride is 3"):
        shape("tiny_densenet", last_stride=3)

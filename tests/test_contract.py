"""What every system keeps to, for every config and every variant that it offers.

A new system gets these tests by its config alone: `VARIANTS`, of which the first is the default,
and `NUM_PARAMETERS` of each, for 751 identities.
"""

import copy
import dataclasses
import functools
import importlib
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from mros_jax import parallel, train
from mros_jax.config import (
    apply_overrides,
    make_network,
    parse_config,
    read,
    shrink,
    split_stages,
)
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
from mros_jax.losses import make_objective
from mros_jax.models import torch_weights
from mros_jax.models.trunks import find_resnet
from mros_jax.training import optimizers, recipe
from mros_jax.training.state import make_state
from mros_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem != "demo"  # a small copy of one of the others
}
SYSTEMS = [(name, variant) for name, module in CONFIGS.items() for variant in module.VARIANTS]
NUM_CLASSES = 751  # of Market-1501, for which parameters are counted
BATCH = 8
PEDESTRIANS = ROOT / "tests" / "data" / "pedestrians"


def get_config(name, variant):
    return read(ROOT / "configs" / f"{name}.py", variant or None)


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


class System:
    """A variant of a config; at full size only shapes are computed."""

    def __init__(self, name, variant):
        self.name, self.variant = name, variant
        self.config = get_config(name, variant)

    @functools.cached_property
    def network(self):
        return make_network(self.config, NUM_CLASSES)

    @property
    def full(self):
        """Shapes of outputs and variables for two images."""
        return find_shapes(self.network, self.config.input.height, self.config.input.width)

    @functools.cached_property
    def tiny(self):
        """A copy with a tiny trunk, small images, four identities and random numbers."""
        return Tiny(shrink(get_config(self.name, self.variant).unlock()))


class Tiny:
    def __init__(self, config):
        config.batch_norm = "synchronised"
        self.groups = optimizers.make_groups(config.optimizer.to_dict())
        network: Any = make_network(config, num_classes=4)
        self.network = network
        self.objective = make_objective(config.objective.to_dict())
        rng = np.random.default_rng(2)
        size = (BATCH, config.input.height, config.input.width, 3)
        self.images = rng.standard_normal(size, np.float32)
        unsynchronised = network.clone(bn_axis_name=None)
        init = functools.partial(unsynchronised.init_with_output, train=False)
        outputs, shapes = jax.eval_shape(init, jax.random.key(0), self.images)
        own = jax.eval_shape(
            lambda: self.objective.init(
                jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape), outputs), 4
            )
        )
        # Kernels are drawn and all else is 1: compiling the initializers would take longest.
        self.variables, self.own = jax.tree.map(
            lambda x: (
                rng.standard_normal(x.shape, np.float32) * 0.1
                if x.ndim > 1
                else np.ones(x.shape, np.float32)
            ),
            (shapes, own),
        )

    def to_float64(self):
        wide = copy.copy(self)
        wide.network = self.network.clone(dtype=jnp.float64)
        wide.variables, wide.own, wide.images = jax.tree.map(
            lambda x: x.astype(np.float64), (self.variables, self.own, self.images)
        )
        return wide


@functools.cache
def find_shapes(network, height, width):
    """Many variants have one network."""
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    init = functools.partial(network.init_with_output, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)


@functools.cache
def get_system(name, variant):
    return System(name, variant)


def find_distinct(*sections):
    """Systems that differ in these sections of their config from those before them."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, variant in SYSTEMS:
        config = get_config(name, variant)
        found.setdefault((name, *(config[x].to_json() for x in sections)), (name, variant))
    return list(found.values())


# To compile a step takes seconds: of other systems and variants they are slow tests.
QUICK = {("mros", "IV"), ("strong", ""), ("pcb", ""), ("trinet", "")}


def each_distinct(*sections):
    return pytest.mark.parametrize(
        "system",
        [
            pytest.param(
                (name, variant),
                marks=() if (name, variant) in QUICK else pytest.mark.slow,
                id="-".join(filter(None, (name, variant))),
            )
            for name, variant in find_distinct(*sections)
        ],
        indirect=True,
    )


@pytest.fixture(params=SYSTEMS, ids=lambda pair: "-".join(filter(None, pair)))
def system(request):
    return get_system(*request.param)


def test_every_config_states_its_variants():
    assert CONFIGS
    for name, module in CONFIGS.items():
        assert get_config(name, None) == get_config(name, module.VARIANTS[0])
        assert set(module.NUM_PARAMETERS) == set(module.VARIANTS)
        names = [get_config(name, variant).name for variant in module.VARIANTS]
        assert len(set(names)) == len(names)


def test_outputs(system):
    outputs, _ = system.full
    batch, length = outputs.descriptor.shape
    assert batch == 2
    parts = system.network.parts(system.config.input.height, system.config.input.width)
    assert sum(part.size for part in parts) == length
    assert all(0 <= part.top < part.bottom <= 1 and part.group for part in parts)
    assert outputs.embeddings or outputs.logits
    for vectors in outputs.embeddings.values():
        assert vectors.shape[0] == 2
        assert len(vectors.shape) == 3
    for logits in outputs.logits.values():
        assert logits.shape == (2, logits.shape[1], NUM_CLASSES)
    assert outputs.maps
    for shape in outputs.maps.values():
        assert shape.shape[0] == 2
    compared = (outputs.descriptor, *outputs.embeddings.values(), *outputs.logits.values())
    assert {x.dtype for x in compared} == {jnp.dtype("float32")}


def test_number_of_parameters(system):
    _, variables = system.full
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert count == CONFIGS[system.name].NUM_PARAMETERS[system.variant]
    if system.variant == CONFIGS[system.name].VARIANTS[0]:
        text = CONFIGS[system.name].__doc__
        assert text is not None
        assert f"{count:,} numbers to learn" in text


def torchvision_state(stage_sizes, width, bottleneck):
    """Name -> shape of a torchvision ResNet."""
    shapes = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (1000, 0), "fc.bias": (1000,)}
    norms = {"bn1": width}
    channels = width
    for stage, size in enumerate(stage_sizes, start=1):
        planes = width * 2 ** (stage - 1)
        out = planes * (4 if bottleneck else 1)
        for i in range(size):
            block = f"layer{stage}.{i}"
            kernels = (
                [(planes, channels, 1), (planes, planes, 3), (out, planes, 1)]
                if bottleneck
                else [(planes, channels, 3), (planes, planes, 3)]
            )
            for j, (outer, inner, kernel) in enumerate(kernels, start=1):
                shapes[f"{block}.conv{j}.weight"] = (outer, inner, kernel, kernel)
                norms[f"{block}.bn{j}"] = outer
            if i == 0 and (stage > 1 or out != channels):
                shapes[f"{block}.downsample.0.weight"] = (out, channels, 1, 1)
                norms[f"{block}.downsample.1"] = out
            channels = out
    for name, size in norms.items():
        leaves = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{name}.{leaf}": (size,) for leaf in leaves}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes | {"fc.weight": (1000, channels)}


def densenet_state(layers=(6, 12, 48, 32), growth=32, channels=64):
    """Name -> shape of torchvision's DenseNet-201."""
    shapes: dict[str, tuple[int, ...]] = {"features.conv0.weight": (channels, 3, 7, 7)}

    def add_norm(name, size):
        shapes.update({f"{name}.{x}": (size,) for x in ("weight", "bias")})
        shapes.update({f"{name}.running_{x}": (size,) for x in ("mean", "var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    add_norm("features.norm0", channels)
    for i, count in enumerate(layers, start=1):
        for j in range(1, count + 1):
            layer = f"features.denseblock{i}.denselayer{j}"
            add_norm(f"{layer}.norm1", channels)
            shapes[f"{layer}.conv1.weight"] = (4 * growth, channels, 1, 1)
            add_norm(f"{layer}.norm2", 4 * growth)
            shapes[f"{layer}.conv2.weight"] = (growth, 4 * growth, 3, 3)
            channels += growth
        if i < len(layers):
            add_norm(f"features.transition{i}.norm", channels)
            shapes[f"features.transition{i}.conv.weight"] = (channels // 2, channels, 1, 1)
            channels //= 2
    add_norm("features.norm5", channels)
    return {**shapes, "classifier.weight": (1000, channels), "classifier.bias": (1000,)}


def test_torchvision_weights(system, monkeypatch):
    """All tensors of torchvision's trunk are used, in all that has a name there.

    A network that is trained from scratch has nothing with such a name.
    """
    _, variables = system.full
    name_of = system.network.torchvision_name
    if system.config.weights == "none":
        modules = {tuple(path.split("/")[:-1]) for path in flatten(variables["params"])}
        assert not any(map(name_of, modules))
        return
    if system.config.network.trunk == "densenet201":
        shapes, tensors = densenet_state(), 1207
    else:
        shapes, tensors = torchvision_state((3, 4, 6, 3), 64, bottleneck=True), 320
    assert len(shapes) == tensors  # as in torchvision's network
    numbers = {name: np.float32(i) for i, name in enumerate(shapes)}
    state = {name: np.broadcast_to(numbers[name], shape) for name, shape in shapes.items()}
    monkeypatch.setattr(torch_weights, "read_state_dict", lambda path: state)
    filled = flatten(torch_weights.load_imagenet("weights.pth", variables, name_of))
    used = set()
    for path, value in filled.items():
        module = name_of(tuple(path.split("/")[1:-1]))
        assert isinstance(value, np.ndarray) == (module is not None), path
        if module is not None:
            used.add(value.flat[0])
    last = ("fc.weight", "fc.bias", "classifier.weight", "classifier.bias")
    left_out = {n for n in shapes if n in last or n.endswith("num_batches_tracked")}
    assert used == {number for name, number in numbers.items() if name not in left_out}


def take_gradients(tiny, num_devices):
    """One step through all that training runs; its optimizer moves nothing and keeps gradients."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params=None: (
            jax.tree.map(jnp.zeros_like, gradients),
            gradients,
        ),
    )
    step = make_train_step(
        tiny.network, tiny.objective, keep, augment=lambda images, keys: images, seed=0
    )
    devices = jax.devices()[:num_devices]
    state = parallel.replicate(make_state(tiny.variables, tiny.own, keep), devices)
    labels = np.repeat(np.arange(4, dtype=np.int32), BATCH // 4)
    batch = parallel.split({"images": tiny.images, "labels": labels}, devices)
    return jax.device_get(parallel.MappedStep(step, devices)(state, None, batch))


@each_distinct("network", "objective", "optimizer")
def test_one_training_step(system):
    """Every parameter has a gradient or is frozen; all that moves is finite. As users train."""
    tiny = system.tiny
    state, metrics = take_gradients(tiny, 1)
    labels = flatten(optimizers.label_params(state.params, tiny.groups))
    for name, gradient in flatten(state.opt_state).items():
        assert gradient.dtype == np.float32, name
        assert np.all(np.isfinite(gradient)), name
        frozen = tiny.groups[labels[name]].kind == "frozen"
        assert frozen or np.any(gradient), f"{name} has no gradient"
    before = flatten(tiny.variables["batch_stats"])
    for name, value in flatten(state.batch_stats).items():
        assert np.all(np.isfinite(value)), name
        assert not np.array_equal(value, before[name]), name
    assert set(metrics) >= {"loss", *(f"loss/{name}" for name in tiny.objective.terms)}
    assert np.all(np.isfinite(list(metrics.values())))


@pytest.mark.slow
@each_distinct("network")
def test_two_devices_do_as_one_does(system):
    # In float64, and therefore far closer than float32 could be. There, of many inputs of ReLUs and
    # maxima some come within rounding of 0 or of each other, where the gradient jumps: two correct
    # programs disagree, whatever the seed, if a network has many of them (HA-CNN). What float32
    # alone could get wrong is in the test above.
    with jax.enable_x64(True):
        tiny = system.tiny.to_float64()
        (one, metrics), (two, metrics_of_two) = (take_gradients(tiny, n) for n in (1, 2))
    gradients, gradients_of_two = flatten(one.opt_state), flatten(two.opt_state)
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Before a batch normalization a bias has no gradient but rounding.
        bound = 1e-8 * max(np.abs(gradient).max(), 1e-2 * largest)
        np.testing.assert_allclose(
            gradients_of_two[name], gradient, rtol=0, atol=bound, err_msg=name
        )
    after = flatten(two.batch_stats)
    for name, value in flatten(one.batch_stats).items():
        np.testing.assert_allclose(after[name], value, rtol=1e-8, atol=1e-8, err_msg=name)
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_of_two[name], value, rtol=1e-6, err_msg=name)


STAGED = [pair for pair in SYSTEMS if get_config(*pair).stages]


@pytest.mark.slow
@pytest.mark.parametrize("pair", STAGED, ids="-".join)
def test_every_stage(pair):
    """Each begins with a new optimizer and its own rates; what is frozen keeps every bit."""
    config = shrink(get_config(*pair).unlock())
    config.batch_norm = "synchronised"
    config.augment.flip = 0.0
    parts = recipe.build(config, num_classes=4, steps_per_epoch=2)
    sections = split_stages(config)
    assert [stage.name for stage in parts.stages] == list(sections)
    assert parts.network == make_network(config, 4)
    size = (BATCH, config.input.height, config.input.width, 3)
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    batch = {"images": images, "labels": np.repeat(np.arange(4, dtype=np.int32), BATCH // 4)}
    devices = jax.devices()[:1]
    batch = parallel.split(batch, devices)
    state, end = parts.state, 0
    for stage, section in zip(parts.stages, sections.values(), strict=True):
        assert (stage.start, stage.end) == (end, end + 2 * section.num_epochs)
        assert parts.stage_at(stage.start) is stage is parts.stage_at(stage.end - 1)
        end = stage.end
        before = stage.begin(dataclasses.replace(state, step=jnp.int32(stage.start)))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(before.opt_state))
        step = parallel.MappedStep(stage.step, devices)
        state, metrics = step(parallel.replicate(before, devices), None, batch)
        state, _ = jax.device_get(step(state, None, batch))
        groups = optimizers.make_groups(section.optimizer.to_dict())
        rates = {f"lr/{n}": g.lr if g.kind != "frozen" else 0.0 for n, g in groups.items()}
        found = {name: float(x) for name, x in metrics.items() if name.startswith("lr/")}
        assert found == pytest.approx(rates)
        after, labels = flatten(state.params), optimizers.label_params(state.params, groups)
        for name, label in flatten(labels).items():
            same = after[name].tobytes() == flatten(before.params)[name].tobytes()
            assert same == (groups[label].kind == "frozen"), (stage.name, name)
    assert end == 2 * config.num_epochs
    assert parts.stage_at(end) is parts.stages[-1]


def test_export_to_pytorch_and_back(system):
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    variables = jax.tree.map(lambda x: draw(x.shape), system.tiny.variables)
    named = torch_weights.to_torch_state_dict(variables)
    again = torch_weights.from_torch_state_dict(named, variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_config_survives_json(system):
    again = ConfigDict(json.loads(system.config.to_json()))
    assert make_network(again, NUM_CLASSES) == system.network
    objective, groups = again.objective.to_dict(), again.optimizer.to_dict()
    assert make_objective(objective) == make_objective(system.config.objective.to_dict())
    assert optimizers.make_groups(groups) == optimizers.make_groups(
        system.config.optimizer.to_dict()
    )
    assert make_sampler(again.batch.to_dict()) == make_sampler(system.config.batch.to_dict())
    ours, theirs = (split_stages(c) for c in (again, system.config))
    for name, stage in ours.items():
        assert json.loads(stage.to_json()) == json.loads(theirs[name].to_json())
        assert make_network(stage, NUM_CLASSES) == make_network(theirs[name], NUM_CLASSES)
    ours, theirs = (recipe.make_schedules(c, steps_per_epoch=1) for c in (again, system.config))
    for name, schedule in ours.items():
        assert float(schedule(50)) == float(theirs[name](50))


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_word_after_the_colon(name):
    with pytest.raises(UserError, match=r"'nonsense'.*expected a variant.*dukemtmc"):
        parse_config([f"--config={ROOT / 'configs' / name}.py:nonsense"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_data_set_after_the_colon(name):
    config, _ = parse_config([f"--config={ROOT / 'configs' / name}.py:duke"])
    assert config is not None
    assert config.dataset.name == "dukemtmc"


def test_a_shrunk_config_works(system):
    recipe.check_config(shrink(get_config(system.name, system.variant).unlock()).lock())


# What a user may do wrong, in any system.


def build(*overrides, file="pcb", variant=""):
    """The parts of a tiny run, with fields changed as on the command line."""
    config = shrink(get_config(file, variant).unlock()).lock()
    apply_overrides(config, [f"--config.{word}" for word in overrides])
    recipe.check_config(config)
    return recipe.build(config, num_classes=4, steps_per_epoch=2)


def save_torchvision_file(path, trunk):
    spec = find_resnet(trunk)
    shapes = torchvision_state(spec.stage_sizes, spec.width, spec.block == "bottleneck")
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("pcb", "objective.cross_entropy.on=('g',)", "no logits 'g'; it has h"),
        ("strong", "objective.triplet.on=('f_x',)", "no output 'f_x'.*it has descriptor, f_t, f_i"),
        ("strong", "objective.center.on=('f_x',)", "no output 'f_x'.*it has descriptor, f_t, f_i"),
        (
            "pcb",
            "optimizer.trunk.params=('network/backbone',)",
            "'network/backbone' of the optimizer's group trunk; .*network/trunk",
        ),
        (
            "pcb",
            "optimizer.heads.params=('network/classifier',)",
            "no group.* network/embedding/.*heads: network/classifier",
        ),
        ("pcb", "network.dropout=1.5", "dropout rate is 1.5"),
        ("pcb", "network.num_stripes=5", "cannot be cut into 5 equal stripes"),
        ("pcb", "network.descriptor=f", "descriptor is 'f'.*'g' or 'h'"),
        ("strong", "network.trunk=resnet5", "trunk is 'resnet5'.*resnet50"),
        ("auto_reid", "network.normal=sep(0)", "config.network.normal: node 2 of a cell is 'sep"),
        ("hacnn", "weights=auto", "weights is 'auto', and the network hacnn starts from no"),
        ("hacnn", "network.widths=(16, 24, 32)", r"widths are \(16, 24, 32\); .*multiples of 16"),
        ("hacnn", "network.region=(24, 30)", r"region is \(24, 30\); .*multiples of 4"),
        (
            "mgn",
            "network.trunk=tiny_densenet",
            "'tiny_densenet'; .* needs a ResNet: tiny,",
        ),
        (
            "dare",
            "objective.stage1.on=('stage5',)",
            "'stage5'.*descriptor, stage1, stage2",
        ),
        ("dare", "eval.resize=(95, 54)", r"config.eval.resize is \(95, 54\); .*at least 96 x 48"),
        ("dare", "augment.erase_fill=black", "erase_fill is 'black'; .* mean, public, noise"),
        ("dare", "input.interpolation=lanczos", "interpolation is 'lanczos'; .*bilinear, bicubic"),
        (
            "dare",
            "batch.sampler=once",
            "is 'once'; .*identities_once, shuffled",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other(file, change, message):
    with pytest.raises(UserError, match=message):
        build(change, file=file)


def test_weights_of_another_trunk(tmp_path):
    save_torchvision_file(tmp_path / "other.safetensors", "resnet18")
    with pytest.raises(UserError, match=r"(?s)other.safetensors does not fit.*layer1\.1\.conv1"):
        build(f"weights={tmp_path / 'other.safetensors'}")


def test_weights_of_this_trunk(tmp_path):
    save_torchvision_file(tmp_path / "tiny.safetensors", "tiny")
    params = build(f"weights={tmp_path / 'tiny.safetensors'}").state.params["network"]
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(params["trunk"]))
    assert not np.all(params["embedding"]["kernel"] == 1)


def test_nothing_is_written_where_parts_do_not_fit(tmp_path):
    config = shrink(get_config("pcb", None).unlock())
    config.dataset.name, config.dataset.root = "folder", str(PEDESTRIANS)
    config.dataset.cache_dir = str(tmp_path / "cache")
    config.batch.size = 4
    config.eval.rerank = ()
    config.objective.cross_entropy.on = ("nope",)
    with pytest.raises(UserError, match="no logits 'nope'"):
        train.train(config.lock(), tmp_path / "run")
    assert not (tmp_path / "run").exists()

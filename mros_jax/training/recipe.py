"""From a config to the parts of a run: network, objective, optimizer, state, step."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax.data import augment, examination
from mros_jax.data.batches import Identities, make_sampler
from mros_jax.data.resample import INTERPOLATIONS
from mros_jax.data.splits import Dataset
from mros_jax.errors import UserError
from mros_jax.files import cache_directory
from mros_jax.inference import CROPS
from mros_jax.losses import Objective, make_objective
from mros_jax.models import torch_weights
from mros_jax.models.outputs import Network, Outputs
from mros_jax.runs import checkpoints
from mros_jax.training import optimizers
from mros_jax.training.source import Source
from mros_jax.training.state import TrainState, make_state
from mros_jax.training.step import Augment, Step, make_train_step

log = logging.getLogger(__name__)

_CHOICES = {
    "dataset.on_bad_image": ("error", "skip"),
    "input.interpolation": INTERPOLATIONS,
    "input.channels": augment.CHANNELS,
    "augment.erase_fill": augment.ERASE_FILLS,
    "augment.erase_place": augment.ERASE_PLACES,
    "eval.crops": CROPS,
    "eval.metric": ("cosine", "euclidean"),
    "eval.ap": ("standard", "trapezoid"),
    "init.checkpoint": checkpoints.NAMES,
}
_AT_LEAST_ONE = (
    "num_epochs",
    "input.height",
    "input.width",
    "accumulate_steps",
    "eval.every_epochs",
    "eval.batch_size",
    "checkpoint_every_epochs",
    "log_every_steps",
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with an optimizer of its own.

    Attributes:
        name: in the config, "" where there is one stage only.
        start: the training step that is its first, counted from 0.
        end: the first step after it.
        optimizer: the optax chain; its state is fresh at `start`.
        step: for one device, see `mros_jax.training.step`.
    """

    name: str
    start: int
    end: int
    optimizer: optax.GradientTransformation
    step: Step

    def begin(self, state: TrainState) -> TrainState:
        """A state, on the host, with the optimizer as it is before this stage's first step."""
        fresh = jax.tree.map(np.asarray, self.optimizer.init(state.params))
        return dataclasses.replace(state, opt_state=fresh)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config's run is made of.

    Attributes:
        network: the Flax module that is evaluated and used, that of the last stage.
        objective: what it is trained for.
        state: before the first step.
        stages: in their order; they share the structure of parameters and statistics.
    """

    network: Network
    objective: Objective
    state: TrainState
    stages: tuple[Stage, ...]

    @property
    def step(self) -> Step:
        """The step of the first stage."""
        return self.stages[0].step

    def stage_at(self, step: int) -> Stage:
        """The stage that a training step belongs to; after the run's end, the last."""
        return next((stage for stage in self.stages if step < stage.end), self.stages[-1])


def check_config(config: ConfigDict) -> None:
    """Refuse what cannot work on any data set, before any work is done.

    Everything but the numbers is built, so that what a part would refuse is refused here.

    Raises:
        UserError: names the field, its value and what is expected.
    """
    _check_finite(config)
    for name in ("seed", "dataset.seed"):
        if (seed := configs.get_field(config, name)) < 0:
            raise UserError(f"config.{name} is {seed}; it must be 0 or more")
    for name, choices in _CHOICES.items():
        configs.check_choice(name, configs.get_field(config, name), choices)
    for name in _AT_LEAST_ONE:
        value = configs.get_field(config, name)
        if value < 1:
            raise UserError(f"config.{name} is {value}; it must be at least 1")
    for name, most in (("ema_decay", 1), ("dataset.device_fraction", None)):
        value = configs.get_field(config, name)
        if value < 0 or value > 1 or value == most:
            below = "to below 1" if most else "to 1"
            raise UserError(f"config.{name} is {value}; it must be from 0 {below}")
    if config.num_steps < 0:
        raise UserError(f"config.num_steps is {config.num_steps}; it must be 0 (off) or more")
    for name, cut in (("augment", True), ("eval", config.eval.crops == "ten")):
        height, width = (config.input.height, config.input.width) if cut else (1, 1)
        augment.resized_size(config[name].resize, height, width, f"config.{name}.resize")
    if config.eval.crops == "ten" and config.eval.flip_test:
        raise UserError("config.eval.flip_test is True; the ten crops have mirror images already")
    if config.clip_norm < 0:
        raise UserError(f"config.clip_norm is {config.clip_norm}; it must be 0 (off) or more")
    configs.make_reranks(config)
    batch, devices = make_sampler(config.batch.to_dict()).size, jax.device_count()
    if batch % devices:
        raise UserError(
            f"a batch of {batch} images cannot be split over {devices} devices; choose a multiple "
            "(config.batch)"
        )
    for name, stage in configs.split_stages(config).items():
        with _name_stage(name):
            _check_parts(stage)


@contextlib.contextmanager
def _name_stage(name: str) -> Iterator[None]:
    """Say of which stage an error is."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise UserError(f"config.stages.{name}: {error}") from error


def _check_finite(section: ConfigDict, name: str = "config") -> None:
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            _check_finite(value, f"{name}.{key}")
        elif any(isinstance(x, float) and not math.isfinite(x) for x in _flatten(value)):
            raise UserError(f"{name}.{key} is {value}; it must be a finite number")


def _flatten(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _check_parts(config: ConfigDict) -> None:
    network = configs.make_network(config, 2)
    for method in configs.make_reranks(config):
        if method.learned and not hasattr(network, "fold_heads"):
            raise UserError(
                f"config.eval.rerank has {method.name}, which needs heads that compare pairs of "
                f"images; the network {config.network.name} has none"
            )
    objective = make_objective(config.objective.to_dict())
    groups = optimizers.make_groups(config.optimizer.to_dict())
    make_schedules(config, steps_per_epoch=1)

    def make_params(key: jax.Array, image: jax.Array) -> dict[str, Any]:
        outputs, variables = network.init_with_output(key, image, train=False)
        own = objective.init(key, outputs, 2)
        objective(own, outputs, jnp.zeros(1, jnp.int32))  # each term finds its outputs
        return {"network": variables["params"], "objective": own}

    key = jax.random.key(0)
    stored = jax.ShapeDtypeStruct((1, 128, 64, 3), jnp.uint8)
    image = jax.eval_shape(make_augment(config), stored, key[None])
    params = jax.eval_shape(make_params, key, image)
    optimizers.label_params(params, groups)
    _check_weights(config, network, params["network"])
    test_size = configs.find_size(config, config.eval)
    if config.eval.crops == "none" and test_size != (config.input.height, config.input.width):
        shape_outputs(network, *test_size)


def _check_weights(config: ConfigDict, network: Network, params: Any) -> None:
    """Refuse ImageNet weights for a network that starts from none."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    modules = (tuple(entry.key for entry in path[:-1]) for path, _ in paths)
    if config.weights != "none" and not any(map(network.torchvision_name, modules)):
        raise UserError(
            f"config.weights is {config.weights!r}, and the network {config.network.name} starts "
            "from no ImageNet weights; set it to 'none'"
        )


def check_fit(config: ConfigDict, dataset: Dataset) -> None:
    """Refuse a config that does not fit its data set, by building everything but the numbers.

    Raises:
        UserError: says which part, and what would work.
    """
    sampler = make_sampler(config.batch.to_dict())
    if isinstance(sampler, Identities):
        examination.check_names(dataset, identities=sampler.identities, images=sampler.images)
    else:
        examination.check_names(dataset, identities=1, images=1)
    gallery = int((config.eval.keep_junk or ~dataset.gallery.junk).sum())
    for method in configs.make_reranks(config):
        try:
            method.check(len(dataset.query), gallery)
        except UserError as error:
            raise UserError(f"config.eval.rerank_options, {error}") from error


# Names of torchvision's weights by trunk, and their files; first choice first: V1 is where
# re-identification codes start from.
IMAGENET_WEIGHTS = {
    "resnet50": {"resnet50_v1": "resnet50-0676ba61", "resnet50_v2": "resnet50-11ad3fa6"},
    "densenet121": {"densenet121": "densenet121-a639ec97"},
    "densenet201": {"densenet201": "densenet201-c1103571"},
}


def find_weights(trunk: str) -> pathlib.Path | None:
    """The ImageNet weights of a trunk that mros_jax.fetch_weights has fetched, if any."""
    candidates = (
        cache_directory("weights") / f"{stem}.{suffix}"
        for stem in IMAGENET_WEIGHTS.get(trunk, {}).values()
        for suffix in ("safetensors", "pth")
    )
    return next((path for path in candidates if path.is_file()), None)


def init_variables(network: Network, config: ConfigDict) -> dict[str, Any]:
    """The network's variables before training: random, then ImageNet weights where it has names.

    Raises:
        UserError: fields or an input size that the network cannot take; weights that are not there
            or do not fit.
    """
    images = jnp.zeros((1, config.input.height, config.input.width, 3), jnp.float32)
    init = jax.jit(functools.partial(network.init, train=False))
    variables: dict[str, Any] = init(jax.random.key(config.seed), images)
    _check_weights(config, network, variables["params"])
    weights = config.weights
    if weights == "auto":
        trunk = config.network.trunk
        weights = find_weights(trunk) or "none"
        if weights == "none" and config.init.run is None:
            names = list(IMAGENET_WEIGHTS.get(trunk, ()))
            log.warning(
                "No ImageNet weights for %s in %s: training starts from random weights and will "
                "end far below the paper. To start from them: %s",
                trunk,
                cache_directory("weights"),
                f"python -m mros_jax.fetch_weights {names[0]}"
                if names
                else "--config.weights=FILE with torchvision's file",
            )
    if weights == "none":
        return variables
    log.info("ImageNet weights: %s", weights)
    return torch_weights.load_imagenet(weights, variables, network.torchvision_name)


def shape_outputs(network: Network, height: int, width: int) -> Outputs:
    """The shapes of a network's outputs for one image."""
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    init = functools.partial(network.init_with_output, train=False)
    outputs: Outputs
    outputs, _ = jax.eval_shape(init, jax.random.key(0), image)
    return outputs


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> dict[str, optimizers.Schedule]:
    """The learning rate, by training step, of each group of parameters that moves in the run.

    It is 0 in a stage in which the group is frozen.
    """
    start, pieces = 0, []
    for section in configs.split_stages(config).values():
        pieces.append((start, _make_schedules_of_stage(section, steps_per_epoch)))
        start += section.num_epochs * steps_per_epoch
    names = dict.fromkeys(name for _, rates in pieces for name in rates)
    return {name: functools.partial(_find_rate, pieces, name) for name in names}


def _find_rate(
    pieces: Sequence[tuple[int, Mapping[str, optimizers.Schedule]]], name: str, step: Any
) -> jax.Array:
    """The rate of a group at a training step, from (first step, schedules) of each stage."""
    rate = jnp.zeros((), jnp.float32)
    for start, rates in pieces:
        own = rates[name](step - start) if name in rates else 0.0
        rate = jnp.where(step < start, rate, own)
    return rate


def _make_schedules_of_stage(
    config: ConfigDict, steps_per_epoch: int
) -> dict[str, optimizers.Schedule]:
    """The learning rates of the groups that move in a stage, by its own step."""
    groups = optimizers.make_groups(config.optimizer.to_dict())
    return optimizers.make_schedules(groups, steps_per_epoch=steps_per_epoch, **config.schedule)


def make_augment(config: ConfigDict) -> Callable[..., jax.Array]:
    """What a training step does with the images of its batch: (images, keys) -> network's input."""
    return functools.partial(
        augment.augment_batch, **config.input.to_dict(), **config.augment.to_dict()
    )


def build(
    config: ConfigDict,
    num_classes: int,
    steps_per_epoch: int,
    *,
    source: Source | None = None,
    augment_batch: Augment | None = None,
) -> Recipe:
    """Make all parts of a run.

    Args:
        config: of `mros_jax.config.base`'s shape.
        num_classes: training identities.
        steps_per_epoch: training steps in an epoch.
        source: what of another run it starts from, of `load_source(config.init)`.
        augment_batch: in place of `make_augment(config)`, for images that are ready.

    Raises:
        UserError: a part that the config describes cannot be, or does not fit the others; says
            which, and what there is.
    """
    network = configs.make_network(config, num_classes)
    objective = make_objective(config.objective.to_dict())
    schedules = make_schedules(config, steps_per_epoch)
    stages: list[Stage] = []
    for name, section in configs.split_stages(config).items():
        with _name_stage(name):
            start = stages[-1].end if stages else 0
            stages.append(
                _build_stage(
                    section,
                    objective,
                    name=name,
                    start=start,
                    num_classes=num_classes,
                    steps_per_epoch=steps_per_epoch,
                    schedules=schedules,
                    augment_batch=augment_batch or make_augment(config),
                )
            )
    variables = init_variables(network, config)
    if source is not None:
        variables = source.fill(variables)
    shapes = shape_outputs(network, config.input.height, config.input.width)
    outputs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    init = jax.jit(lambda key: objective.init(key, outputs, num_classes))
    own = init(jax.random.key(config.seed))
    use_ema = config.ema_decay > 0
    state = make_state(variables, own, stages[0].optimizer, use_ema=use_ema)
    return Recipe(network, objective, state, tuple(stages))


def _build_stage(
    config: ConfigDict,
    objective: Objective,
    *,
    name: str,
    start: int,
    num_classes: int,
    steps_per_epoch: int,
    schedules: Mapping[str, optimizers.Schedule],
    augment_batch: Augment,
) -> Stage:
    """Make a stage of `mros_jax.config.split_stages`, which begins at step `start`.

    `schedules` are the run's, for the log: all of its stages log the same rates.
    """
    groups = optimizers.make_groups(config.optimizer.to_dict())
    steps = config.num_epochs * steps_per_epoch
    if config.accumulate_steps > steps:
        raise UserError(
            f"config.accumulate_steps is {config.accumulate_steps}, and the run has only {steps} "
            "steps: it would end before its first update"
        )
    optimizer = optimizers.make_optimizer(
        groups,
        _make_schedules_of_stage(config, steps_per_epoch),
        clip_norm=config.clip_norm or None,
        accumulate_steps=config.accumulate_steps,
    )
    step = make_train_step(
        configs.make_network(config, num_classes),
        objective,
        optimizer,
        augment=augment_batch,
        seed=config.seed,
        schedules=schedules,
        ema_decay=config.ema_decay,
        freeze=functools.partial(optimizers.stop_frozen, groups=groups),
    )
    return Stage(name, start, start + steps, optimizer, step)

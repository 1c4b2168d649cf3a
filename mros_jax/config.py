"""Configs: what they hold, read from a file, changed on the command line, and what they describe.

A config of a system is its paper's differences over `base`. Each section goes to one function or
class as its keyword arguments, so that a field that is not known there is an error by itself.
"""

import argparse
import difflib
import functools
import importlib.util
import inspect
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from mros_jax import errors, parallel
from mros_jax.data import store
from mros_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from mros_jax.data.datasets import records, sources
from mros_jax.data.splits import Dataset, Split
from mros_jax.errors import NotFoundError, UserError
from mros_jax.models.outputs import Network
from mros_jax.models.trunks import find_trunk
from mros_jax.retrieval import rerank
from mros_jax.systems import NETWORKS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH_NORMS = {"per_device": None, "synchronised": parallel.AXIS}

# What may follow the colon of `--config configs/NAME.py:` beside the names of the data sets.
_SHORT = {"market": "market1501", "duke": "dukemtmc"}


def base(dataset: str = "market1501") -> ConfigDict:
    """The fields that every config has, with this project's defaults.

    Network, objective and optimizer are for the system to fill.

    Args:
        dataset: a name in `mros_jax.data.datasets.records.DATASETS`.
    """
    config = ConfigDict()
    config.name = ""  # of the system, as in the paper's tables
    config.seed = 0
    config.num_epochs = 120
    config.num_steps = 0  # length of the run in steps; 0: num_epochs

    config.dataset = ConfigDict()
    config.dataset.name = dataset
    config.dataset.root = placeholder(str)  # where the data set lies
    config.dataset.on_bad_image = "error"  # or "skip": leave unreadable images out, and say so
    config.dataset.cache_dir = placeholder(str)  # decoded images; None: the user's cache directory
    config.dataset.device_fraction = 0.5  # keep images on the device up to this share of its memory
    config.dataset.distractors_500k = False  # Market-1501 only: with the 500,000 distractors
    config.dataset.include_val = True  # MSMT17 only: train on the validation list too, as published
    config.dataset.test_set = 0  # classic CUHK03 only: which of the 20 splits
    config.dataset.preset = "market"  # synthetic only: its size, "market", "demo" or "small"
    config.dataset.seed = 0  # synthetic only: other seed, other people

    config.batch = ConfigDict()  # sampler: a key of `mros_jax.data.batches.SAMPLERS`; its fields
    config.batch.sampler = "identities"
    config.batch.identities = 32  # P
    config.batch.images = 4  # K

    config.input = ConfigDict()
    config.input.height = 384
    config.input.width = 128
    config.input.interpolation = "bilinear"  # or "bicubic": how images are resized, as PIL does
    config.input.mean = IMAGENET_MEAN  # of each channel, as a share of 255: is subtracted;
    config.input.std = IMAGENET_STD  # and what the rest is divided by
    config.input.channels = "rgb"  # or "bgr": the order in which the network takes them

    config.augment = ConfigDict()
    config.augment.resize = ()  # height and width before the crop to the input's size; (): that
    config.augment.flip = 0.5  # probability
    config.augment.pad = 10  # pixels, zero, then a random crop back to size
    config.augment.erase = 0.5  # probability
    config.augment.erase_area = (0.02, 0.4)  # share of the image
    config.augment.erase_aspect = (0.3, 1 / 0.3)
    # "mean"; "public", as the public lineage fills; "noise"; or "color", one for each image
    config.augment.erase_fill = "mean"
    config.augment.erase_place = "uniform"  # or "corner", see `mros_jax.data.augment.draw_params`

    config.network = ConfigDict()  # name: a key of `mros_jax.systems.NETWORKS`; and its fields
    # ImageNet weights: a file; "none": a random start; "auto": what mros_jax.fetch_weights has
    # fetched, else a warning and a random start.
    config.weights = "auto"
    # Another run's directory, whose network this one starts from as far as names and shapes agree;
    # all else starts as without. None: no run.
    config.init = ConfigDict()
    config.init.run = placeholder(str)
    config.init.checkpoint = "last"  # or "best"
    config.dtype = "float32"  # or "bfloat16": compute only, parameters stay float32
    # "per_device", as DataParallel; "synchronised": over the global batch
    config.batch_norm = "per_device"

    # Terms by name: `loss`, a key of `mros_jax.losses.objective.TERMS`; `weight`, 0 leaves it out;
    # `on`, the network's outputs that it looks at; and the term's other fields.
    config.objective = ConfigDict()

    # Groups of parameters by name: `params`, their paths; and the fields of
    # `mros_jax.training.optimizers.Group`.
    config.optimizer = ConfigDict()
    config.schedule = ConfigDict()  # of every group that is `scheduled`
    config.schedule.warmup_epochs = 0
    config.schedule.warmup_factor = 0.01  # the first epoch's share of the rate
    config.schedule.warmup_per = "epoch"  # or "iteration"
    config.schedule.warmup = "linear"  # or "exponential"
    config.schedule.decay = "steps"  # or "exponential", "cosine_restarts"
    config.schedule.decay_epochs = ()  # "steps": the rate is multiplied by the factor at each
    config.schedule.decay_start = 0  # "exponential": the training step t0 where it begins, and
    config.schedule.decay_length = 1  # l: the rate is multiplied by factor^((t - t0) / l)
    config.schedule.decay_factor = 0.1
    config.schedule.cycle_epochs = 10  # "cosine_restarts": of the first cycle, after the warm-up
    config.schedule.cycle_growth = 2  # each cycle is so many times as long as the one before
    config.clip_norm = 0.0  # largest global norm of the network's gradient; 0: no clipping
    config.accumulate_steps = 1  # batches averaged into one update
    config.ema_decay = 0.0  # moving average of parameters for evaluation; 0: none

    # Stages of the training by name, taken in the order of their names; none: one stage. Each has
    # `epochs`, which add up to num_epochs (0: it is left out), and what differs there in `network`,
    # `optimizer` and `schedule`. See docs/training.md for what a stage begins anew.
    config.stages = ConfigDict()

    config.eval = ConfigDict()
    config.eval.every_epochs = 10  # and at the end, then with re-ranking
    config.eval.batch_size = 128  # images
    config.eval.resize = ()  # height and width of images at test; (): the input's
    # "none": whole images; "ten": mean of ten crops of the input's size, five of the mirror image
    config.eval.crops = "none"
    config.eval.metric = "cosine"  # or "euclidean"
    config.eval.normalize = True  # divide descriptors by their norm
    config.eval.ap = "standard"  # or "trapezoid", the Market-1501 MATLAB code's
    config.eval.flip_test = False
    config.eval.keep_junk = False
    config.eval.rerank = ("ecn",)  # at the end; any of the following
    config.eval.rerank_options = ConfigDict(
        {
            "ecn": {"k": 25, "t": 3, "q": 8, "method": "rankdist"},
            "k_reciprocal": {"k1": 20, "k2": 6, "lambda_value": 0.3},
            "aqe": {},
            "gsrw": {"top": 75, "alpha": 0.95},
        }
    )

    config.checkpoint_every_epochs = 5  # and whenever the run is evaluated or stopped
    config.log_every_steps = 20  # metrics are fetched from the device this often
    config.report = True  # write report.html at the end
    return config


def choose(arg: str | None, variants: Sequence[str]) -> tuple[str, str]:
    """Read what a user wrote after the colon of `--config configs/NAME.py:ARG`.

    Args:
        arg: at most one variant and one data set, in any order, separated by a comma.
        variants: of this system; the first is taken where `arg` names none.

    Returns:
        The variant and the data set's name.

    Raises:
        UserError: another word; lists what there is.
    """
    variant, dataset = variants[0], "market1501"
    for word in filter(None, (arg or "").split(",")):
        if word in variants:
            variant = word
        elif _SHORT.get(word, word) in records.DATASETS:
            dataset = _SHORT.get(word, word)
        else:
            raise UserError(
                f"unknown config argument {word!r}: expected a variant "
                f"({', '.join(filter(None, variants))}) or a data set "
                f"({', '.join((*_SHORT, *records.DATASETS))})"
            )
    return variant, dataset


def shrink(config: ConfigDict) -> ConfigDict:
    """Make a system's config laptop-sized, in place: small network and images, embedded data."""
    config.dataset.name = "synthetic"
    config.dataset.preset = "demo"
    # A probe brings its gallery images: an epoch is that many times as long.
    shorten(config, epochs=8 if "probes" in config.batch else 32, steps=300)
    if "identities" in config.batch:
        config.batch.identities = min(config.batch.identities, 16)
    if "probes" in config.batch:
        config.batch.probes = min(config.batch.probes, 16)
    config.input.height = 96
    config.input.width = 48
    config.augment.pad = min(config.augment.pad, 4)
    for section in (config.augment, config.eval):
        if section.resize:
            section.resize = (108, 54)
    network = config.network
    if "trunk" in network:
        network.trunk = find_trunk(network.trunk).smallest
    if "widths" in network:
        network.widths = (16, 32, 48)
    if "cells" in network:
        network.cells, network.width = (1, 1, 1), 8  # the last map has 6 rows
    if "depth" in network:
        network.depth = min(network.depth, 2)  # the last map has 6 rows
    config.weights = "none"
    return config


def shorten(config: ConfigDict, *, epochs: int, steps: int) -> None:
    """Give a config another length, in place; its schedule shrinks with it.

    Args:
        config: of a system.
        epochs: of the run; divided among its stages in proportion, at least one for each.
        steps: of a run that is as long as its steps say (`num_steps`).
    """
    config.num_epochs = epochs
    if config.stages:
        stages = list(config.stages.values())
        total = sum(stage.epochs for stage in stages)
        for stage in stages:
            stage.epochs = max(epochs * stage.epochs // total, 1)
        config.num_epochs = sum(stage.epochs for stage in stages)
    schedule = config.schedule
    if config.num_steps:
        share = steps / config.num_steps
        config.num_steps = steps
        schedule.decay_start = int(schedule.decay_start * share)
        schedule.decay_length = max(int(schedule.decay_length * share), 1)
        for group in config.optimizer.values():
            if "b1_changes" in group:
                group.b1_changes = tuple((int(step * share), b1) for step, b1 in group.b1_changes)
    schedule.warmup_epochs = min(schedule.warmup_epochs, epochs // 8)
    if schedule.decay == "steps":
        later = {5 * epochs // 8, 7 * epochs // 8}
        schedule.decay_epochs = tuple(sorted(later - {0}))
    schedule.cycle_epochs = min(schedule.cycle_epochs, max(epochs // 8, 1))
    config.eval.every_epochs = max(epochs // 4, 1)


def load_dataset(config: ConfigDict) -> Dataset:
    """The data set that a config names.

    Raises:
        UserError: no such data set, or none at its root.
    """
    data = config.dataset
    options = records.pick_options(data.to_dict())
    return sources.load_dataset(data.name, data.root, on_bad_image=data.on_bad_image, **options)


def load_images(config: ConfigDict, split: Split, *, progress: bool = True) -> store.ImageStore:
    """The decoded images of a split, in the size and from the cache that a config names."""
    training = split.labels is not None
    height, width = find_size(config, config.augment if training else config.eval)
    return store.load_store(
        split,
        height=height,
        width=width,
        interpolation=config.input.interpolation,
        cache_dir=config.dataset.cache_dir,
        on_bad_image=config.dataset.on_bad_image,
        progress=progress,
    )


def find_normalization(config: ConfigDict) -> dict[str, Any]:
    """What images are normalized with: those arguments of `mros_jax.data.augment.preprocess`.

    The config of a run of a version that had no such fields gives none: the defaults are its.
    """
    return {
        name: config.input[name] for name in ("mean", "std", "channels") if name in config.input
    }


def find_size(config: ConfigDict, section: ConfigDict) -> tuple[int, int]:
    """Height and width that images are resized to: the section's `resize`, else the input's."""
    height, width = section.resize or (config.input.height, config.input.width)
    return height, width


# What a stage of the training may change.
_STAGE_SECTIONS = ("network", "optimizer", "schedule")


def split_stages(config: ConfigDict) -> dict[str, ConfigDict]:
    """The stages of a run by name, in their order, each as the config of a run without stages.

    A config without stages is one stage, "". A stage begins with a new optimizer. Frozen parameters
    keep every bit; batch normalization takes no note of that: in a stage whose trunk is frozen it
    still uses the statistics of the batch, and its running statistics, which are no parameters,
    move on. Dropout is on as well.

    Raises:
        UserError: epochs that do not add up to the run's, or a field that a stage cannot have.
    """
    if not config.stages:
        return {"": config}
    for name in config.stages:
        _check_stage(config, name)
    names = [name for name in sorted(config.stages) if config.stages[name].epochs]
    if not names:
        raise UserError(
            "the config.stages.NAME.epochs are all 0; at least one stage must be trained"
        )
    epochs = [config.stages[name].epochs for name in names]
    if sum(epochs) != config.num_epochs:
        raise UserError(
            f"config.num_epochs is {config.num_epochs}, and the epochs of its stages "
            f"{', '.join(names)} are {' + '.join(map(str, epochs))} = {sum(epochs)}; set "
            f"config.num_epochs or a config.stages.NAME.epochs"
        )
    if config.num_steps:
        raise UserError(
            f"config.num_steps is {config.num_steps}; stages are counted in epochs: leave it 0"
        )
    return {name: _apply_stage(config, config.stages[name], name) for name in names}


def _check_stage(config: ConfigDict, name: str) -> None:
    stage, where = config.stages[name], f"config.stages.{name}"
    if not isinstance(stage, ConfigDict):
        raise UserError(f"{where} is {stage!r}; expected a section with epochs")
    known = ("epochs", *_STAGE_SECTIONS)
    if unknown := sorted(set(stage) - set(known)):
        raise UserError(f"{where} has no field {', '.join(unknown)}; there are {', '.join(known)}")
    epochs = stage.get("epochs")
    if not isinstance(epochs, int) or epochs < 0:
        raise UserError(f"{where}.epochs is {epochs}; it must be 1 or more, or 0 (left out)")
    for section in _STAGE_SECTIONS:
        if not isinstance(value := stage.get(section, ConfigDict()), ConfigDict):
            raise UserError(f"{where}.{section} is {value!r}; expected a section")
    if unknown := sorted(set(stage.get("schedule", ())) - set(config.schedule)):
        raise UserError(
            f"{where}.schedule has no field {', '.join(unknown)}; there are "
            f"{', '.join(config.schedule)}"
        )


def _apply_stage(config: ConfigDict, stage: ConfigDict, name: str) -> ConfigDict:
    changes = {section: stage[section] for section in _STAGE_SECTIONS if section in stage}
    alone = config.copy_and_resolve_references()
    with alone.unlocked():
        alone.stages = ConfigDict()
        alone.num_epochs = stage.epochs
        try:
            alone.update(changes)
        except TypeError as error:
            raise UserError(f"config.stages.{name}: {error}") from error
    return alone


def make_network(config: ConfigDict, num_classes: int) -> Network:
    """The network that a config describes, that of its last stage where there are several.

    Raises:
        UserError: an unknown network, precision or field; lists what there is.
    """
    config = list(split_stages(config).values())[-1]
    fields = config.network.to_dict()
    name = fields.pop("name", None)
    errors.check_choice("network.name", name, NETWORKS)
    known = set(inspect.signature(NETWORKS[name]).parameters) - {"parent", "name"}
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"network has no field {', '.join(unknown)}; {name} has {', '.join(sorted(known))}"
        )
    check_choice("dtype", config.dtype, DTYPES)
    check_choice("batch_norm", config.batch_norm, BATCH_NORMS)
    # A config read from JSON has lists for tuples, and Flax needs fields that can be hashed.
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    # Of networks that compare images of a batch, which is that of all devices.
    shared = {"axis_name": parallel.AXIS} if "axis_name" in known else {}
    return NETWORKS[name](
        num_classes=num_classes,
        dtype=DTYPES[config.dtype],
        bn_axis_name=BATCH_NORMS[config.batch_norm],
        **shared,
        **fields,
    )


def make_reranks(config: ConfigDict) -> tuple[rerank.Rerank, ...]:
    """The ways to re-rank at the end of a run that a config names.

    Raises:
        UserError: an unknown method or option, or a value out of range; lists what there is.
    """
    try:
        return rerank.parse(config.eval.rerank, config.eval.rerank_options.to_dict())
    except UserError as error:
        raise UserError(f"config.eval.rerank, rerank_options: {error}") from error


def check_choice(name: str, value: Any, choices: Mapping[str, Any] | Sequence[str]) -> None:
    """Refuse a field's value that is not among the choices.

    Raises:
        UserError: names the field, its value and the choices.
    """
    errors.check_choice(f"config.{name}", value, choices)


def get_field(config: ConfigDict, name: str) -> Any:
    """The value of a field such as "optimizer.network.lr"."""
    return functools.reduce(lambda section, word: section[word], name.split("."), config)


def read_variants(path: str | pathlib.Path) -> tuple[str, ...]:
    """What a config file offers as `VARIANTS`, the default first; ("",) where it has no such list.

    Raises:
        NotFoundError: there is no such file.
        UserError: the file is no config.
    """
    return tuple(getattr(_load_module(path), "VARIANTS", ("",)))


def read(path: str | pathlib.Path, arg: str | None = None) -> ConfigDict:
    """Read a config file: what its `get_config(arg)` returns, locked.

    Args:
        path: a Python file; `configs/mros.py` is this project's also where there is no such file.
        arg: what a user writes after a colon, to choose a variant or a data set.

    Raises:
        NotFoundError: there is no such file.
        UserError: the file is no config, or does not know `arg`.
    """
    config = _load_module(path).get_config(arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {path}: get_config() returned no ConfigDict but {config!r}")
    return config.lock()


def _load_module(path: str | pathlib.Path) -> Any:
    path = _find(pathlib.Path(path))
    if path.suffix != ".py":
        raise UserError(f"config {path} is not a Python file; expected one with get_config()")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is no Python: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path} has no function get_config()")
    return module


def _find(path: pathlib.Path) -> pathlib.Path:
    """The file itself, else the one of this project that is written so, from any directory."""
    if path.is_file():
        return path
    own = _find_directory()
    if path.parent == pathlib.Path("configs") and (own / path.name).is_file():
        return own / path.name
    names = ", ".join(sorted(f"configs/{file.name}" for file in own.glob("*.py")))
    raise NotFoundError(f"config {path} does not exist; there are {names or 'none'}")


def _find_directory() -> pathlib.Path:
    """Where this project's configs are: installed they lie in the package; in a clone beside it."""
    package = pathlib.Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def list_configs() -> tuple[pathlib.Path, ...]:
    """The config files of this project, but for `demo.py`, a small copy of one of the others."""
    return tuple(p for p in sorted(_find_directory().glob("*.py")) if p.stem != "demo")


def parse_config(argv: Sequence[str]) -> tuple[ConfigDict | None, list[str]]:
    """Take `--config FILE[:ARG]` and `--config.FIELD=VALUE` out of a command line.

    Values are converted to the type that a field has; a field that the config does not have is an
    error.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        The config, None where there is no `--config`; and the other arguments in their order.

    Raises:
        UserError: no such file, argument or field, or a value of another type.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        known, others = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    overrides, rest = split_overrides(others)
    if known.config is None:
        if overrides:
            raise UserError(f"{overrides[0]} changes a config, and no --config FILE is given")
        return None, rest
    path, _, arg = known.config.partition(":")
    config = read(path, arg or None)
    apply_overrides(config, overrides)
    return config, rest


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--config.FIELD=VALUE` out of a command line, also where the value is the next argument.

    Returns:
        What was taken, for `apply_overrides`; and the other arguments in their order.
    """
    overrides: list[str] = []
    rest: list[str] = []
    wants_value = False
    for word in argv:
        if wants_value and not word.startswith("--"):
            overrides[-1] += f"={word}"
            wants_value = False
        elif word.startswith("--config."):
            overrides.append(word)
            wants_value = "=" not in word
        else:
            rest.append(word)
            wants_value = False
    return overrides, rest


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Set fields of a locked config from `--config.FIELD=VALUE` words, in place.

    Raises:
        UserError: there is no such field, or the value is of another type.
    """
    for word in overrides:
        check_field(config, word.partition("=")[0].removeprefix("--config."))
    values = flags.FlagValues()
    arguments = ["", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).removeprefix("flag ")) from error


def has_field(config: ConfigDict, name: str) -> bool:
    """Whether a config has a field such as "optimizer.network.lr"."""
    try:
        check_field(config, name)
    except UserError:
        return False
    return True


def list_changes(before: ConfigDict, after: ConfigDict) -> tuple[str, ...]:
    """The `--config.FIELD=VALUE` words that make one config of another with the same fields."""

    def walk(before: ConfigDict, after: ConfigDict, path: str) -> Iterator[str]:
        for key, value in after.items():
            if isinstance(value, ConfigDict):
                yield from walk(before[key], value, f"{path}.{key}")
            elif value != before[key]:
                yield f"{path}.{key}={value}"

    return tuple(walk(before, after, "--config"))


def check_field(config: ConfigDict, name: str) -> None:
    """Refuse the name of a field, such as "optimizer.network.lr", that a config does not have.

    Raises:
        UserError: says which part of the name is not known, and what there is.
    """
    section = config
    walked = "config"
    for word in name.split("."):
        fields = list(section.keys()) if isinstance(section, ConfigDict) else []
        if word not in fields:
            near = difflib.get_close_matches(word, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"--config.{name}: {walked} has no field {word!r}{hint} "
                f"({', '.join(fields) or 'it is a single value'})"
            )
        section, walked = section[word], f"{walked}.{word}"

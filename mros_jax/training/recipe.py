"""From a config to the parts of a run: data set, model, optimiser, step.

Together with `train.py` the only code that sees a whole config; what it calls takes explicit
arguments.
"""

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mros_jax import losses, parallel
from mros_jax.data import doctor, store
from mros_jax.data.datasets import sources
from mros_jax.data.datasets.splits import Split
from mros_jax.files import cache_directory
from mros_jax.models import torch_weights
from mros_jax.systems.mros import MROS
from mros_jax.training.optimizers import Schedule, make_optimizer, make_schedule
from mros_jax.training.state import TrainState, make_state
from mros_jax.training.step import make_train_step

log = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH_NORMS = {"per_device": None, "synchronised": parallel.AXIS}

_CHOICES = {
    "dataset.on_bad_image": ("error", "skip"),
    "augment.erase_fill": ("mean", "public"),
    "model.setting": ("I", "II", "III", "IV"),
    "model.dtype": tuple(DTYPES),
    "model.batch_norm": tuple(BATCH_NORMS),
    "loss.triplet_reduction": ("mean", "sum"),
    "loss.center_reduction": ("mean", "sum"),
    "optimizer.name": ("adam", "adamw"),
    "optimizer.warmup_per": ("epoch", "iteration"),
    "eval.metric": ("cosine", "euclidean"),
    "eval.ap": ("standard", "trapezoid"),
}
# Fields of config.dataset that only some data sets have.
_DATASET_OPTIONS = {
    "market1501": ("distractors_500k",),
    "msmt17": ("include_val",),
    "msmt17_v2": ("include_val",),
    "cuhk03_labeled_classic": ("test_set",),
    "cuhk03_detected_classic": ("test_set",),
    "synthetic": ("preset", "seed"),
}
_AT_LEAST_ONE = (
    "num_epochs",
    "batch.identities",
    "batch.images",
    "input.height",
    "input.width",
    "optimizer.accumulate_steps",
    "eval.every_epochs",
    "eval.batch_size",
    "checkpoint_every_epochs",
    "log_every_steps",
)


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot work, before any work is done.

    Raises:
        ValueError: names the field, its value and what is expected.
    """
    values = {name: functools.reduce(getattr, name.split("."), config) for name in _CHOICES}
    for name, value in values.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"config.{name} is {value!r}; expected one of {_CHOICES[name]}")
    for name in _AT_LEAST_ONE:
        value = functools.reduce(getattr, name.split("."), config)
        if value < 1:
            raise ValueError(f"config.{name} is {value}; it must be at least 1")
    for name in config.eval.rerank:
        if name not in config.eval.rerank_options:
            raise ValueError(
                f"config.eval.rerank names {name!r}; expected some of "
                f"{tuple(config.eval.rerank_options)}"
            )
    batch, devices = config.batch.identities * config.batch.images, jax.device_count()
    if batch % devices:
        raise ValueError(
            f"a batch of {config.batch.identities} identities x {config.batch.images} images = "
            f"{batch} cannot be split over {devices} devices; choose a multiple"
        )


def load_dataset(config: ConfigDict) -> sources.Dataset:
    """The data set that the config names.

    Raises:
        ValueError, FileNotFoundError: no such data set, or none at its root.
    """
    data = config.dataset
    options = {name: data[name] for name in _DATASET_OPTIONS.get(data.name, ())}
    return sources.load_dataset(data.name, data.root, on_bad_image=data.on_bad_image, **options)


def load_images(config: ConfigDict, split: Split, *, progress: bool = True) -> store.ImageStore:
    """The decoded images of a split, in the size and from the cache that the config names."""
    return store.load_store(
        split,
        height=config.input.height,
        width=config.input.width,
        cache_dir=config.dataset.cache_dir,
        on_bad_image=config.dataset.on_bad_image,
        progress=progress,
    )


def make_model(model_config: ConfigDict, num_classes: int) -> MROS:
    """The network that a config's `model` section describes."""
    return MROS(
        num_classes=num_classes,
        setting=model_config.setting,
        backbone=model_config.backbone,
        num_stripes=model_config.num_stripes,
        last_stride=model_config.last_stride,
        neck_bias=model_config.neck_bias,
        dtype=DTYPES[model_config.dtype],
        bn_axis_name=BATCH_NORMS[model_config.batch_norm],
    )


def check_fit(config: ConfigDict, dataset: sources.Dataset, model: MROS) -> None:
    """Refuses a config that does not fit its data set, or an input size the model cannot take.

    Raises:
        ValueError: says which, and what would work.
    """
    doctor.check_cheap(dataset, identities=config.batch.identities, images=config.batch.images)
    image = jax.ShapeDtypeStruct((1, config.input.height, config.input.width, 3), jnp.float32)
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    searched = len(dataset.query) + int((config.eval.keep_junk or ~dataset.gallery.junk).sum())
    for name in config.eval.rerank:
        longest = max(
            (v for k, v in config.eval.rerank_options[name].items() if k.startswith(("k", "q"))),
            default=0,
        )
        if longest >= searched:
            raise ValueError(
                f"config.eval.rerank_options.{name} looks for {longest} neighbours, but query and "
                f"gallery of {dataset.name} have only {searched} images; lower it, or leave {name} "
                "out of config.eval.rerank"
            )


def find_weights(backbone: str) -> pathlib.Path | None:
    """The fetched ImageNet weights of a backbone, torchvision's V1 before V2, if there are any."""
    found = [
        p
        for s in ("safetensors", "pth")
        for p in cache_directory("weights").glob(f"{backbone}-*.{s}")
    ]
    return min(found, key=lambda path: path.name, default=None)


def init_variables(model: MROS, config: ConfigDict) -> dict[str, Any]:
    """The variables before training: random, then ImageNet weights for the backbone."""
    images = jnp.zeros((1, config.input.height, config.input.width, 3), jnp.float32)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(config.seed), images)
    weights = config.model.weights
    if weights == "auto":
        weights = find_weights(config.model.backbone) or "none"
        if weights == "none":
            log.warning(
                "No ImageNet weights for %s in %s: training starts from random weights and will "
                "end far below the paper. To fetch them: python scripts/fetch_weights.py",
                config.model.backbone,
                cache_directory("weights"),
            )
    if weights == "none":
        return variables
    log.info("ImageNet weights: %s", weights)
    return torch_weights.load_imagenet(weights, variables)


def make_config_schedule(config: ConfigDict, steps_per_epoch: int) -> Schedule:
    """The learning rate by training step that a config's `optimizer` section describes."""
    return make_schedule(
        lr=config.optimizer.lr,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.optimizer.warmup_epochs,
        warmup_factor=config.optimizer.warmup_factor,
        warmup_per=config.optimizer.warmup_per,
        milestones=config.optimizer.decay_epochs,
        decay=config.optimizer.decay_factor,
    )


def build(
    config: ConfigDict, model: MROS, steps_per_epoch: int
) -> tuple[TrainState, Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]]:
    """The state before the first step, and the step (for one device, see `steps`)."""
    variables = init_variables(model, config)
    schedule = make_config_schedule(config, steps_per_epoch)
    optimizer = make_optimizer(
        schedule,
        name=config.optimizer.name,
        weight_decay=config.optimizer.weight_decay,
        decay_norm_and_bias=config.optimizer.decay_norm_and_bias,
        clip_norm=config.optimizer.clip_norm or None,
        accumulate_steps=config.optimizer.accumulate_steps,
    )
    image = jax.ShapeDtypeStruct((1, config.input.height, config.input.width, 3), jnp.float32)
    centers = losses.init_centers(
        jax.random.fold_in(jax.random.key(config.seed), 1),
        model.num_classes,
        jax.eval_shape(functools.partial(model.apply, train=False), variables, image),
        setting=config.model.setting,
    )
    ema_decay = config.optimizer.ema_decay
    state = make_state(variables, optimizer, centers, use_ema=ema_decay > 0)
    step = make_train_step(
        model,
        optimizer,
        schedule,
        seed=config.seed,
        augmentation={**config.input.to_dict(), **config.augment.to_dict()},
        beta=config.loss.center_weight,
        loss={
            "setting": config.model.setting,
            "margin": None if config.loss.soft_margin else config.loss.margin,
            "smoothing": config.loss.smoothing,
            "triplet_reduction": config.loss.triplet_reduction,
            "center_reduction": config.loss.center_reduction,
        },
        center_lr=config.optimizer.center_lr,
        ema_decay=ema_decay,
    )
    return state, step

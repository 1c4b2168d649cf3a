"""What the scripts share: a command line with a config, tables, and the step that they time."""

import argparse
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mros_jax import console, parallel
from mros_jax.config import parse_config
from mros_jax.data.batches import make_sampler
from mros_jax.files import write_atomically
from mros_jax.training import recipe
from mros_jax.training.step import Augment

ROOT = pathlib.Path(__file__).resolve().parents[1]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's own docstring."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[ConfigDict, argparse.Namespace]:
    """Read `--config FILE[:ARG]`, `--config.FIELD=VALUE` and the parser's own arguments.

    Returns:
        The config; and the arguments, among them `config_words`, the words that gave the config.

    Raises:
        UserError: the config cannot be read.
    """
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        required=True,
        help="config file; --config.FIELD=VALUE sets a field",
    )
    args, overrides = parser.parse_known_args(argv)
    args.config_words = [f"--config={args.config}", *overrides]
    config, rest = parse_config(args.config_words)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    assert config is not None
    return config, args


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    """Add `--repeats`, the timed runs of everything that is measured."""
    parser.add_argument("--repeats", type=console.count, default=default, help="timed runs of each")


def add_markdown(parser: argparse.ArgumentParser) -> None:
    """Add `--markdown`, for `publish`."""
    parser.add_argument("--markdown", type=pathlib.Path, help="also write the table to this file")


def publish(text: str, markdown: pathlib.Path | None) -> None:
    """Print a table, and write it where `--markdown` says."""
    print(text)
    if markdown is not None:
        with write_atomically(markdown) as file:
            file.write(text + "\n")


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; columns after the first are numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows))


def describe_machine(*packages: str) -> str:
    """One sentence part for a table: processor, devices, versions.

    Args:
        packages: distributions whose versions are named besides JAX's and NumPy's.
    """
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    device = jax.devices()[0]
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return ", ".join(
        [
            f"{os.cpu_count()} cores of {cpu}",
            f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
            platform.system(),
            f"Python {platform.python_version()}",
            f"jax {jax.__version__}",
            f"numpy {importlib.metadata.version('numpy')}",
            *versions,
        ]
    )


def describe_config(config: ConfigDict) -> str:
    """One sentence part for a table: system, input, batch and precision."""
    sampler = make_sampler(config.batch.to_dict())
    return (
        f"{config.name}, {config.network.get('trunk', config.network.name)}, "
        f"{config.input.height} x {config.input.width}, batch {sampler.size}, {config.dtype}"
    )


def keep_images(images: jax.Array, keys: jax.Array) -> jax.Array:
    """No augmentation, for a step whose images are ready."""
    return images


def make_step(
    config: ConfigDict,
    num_classes: int,
    data: Any,
    batch: Any,
    *,
    augment_batch: Augment | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[], dict[str, jax.Array]]:
    """The step that training runs, from random weights, on one batch over and over.

    Args:
        config: what is trained.
        num_classes: training identities.
        data: all images and labels on the devices, or None.
        batch: of the step, on the devices; see `mros_jax.training.step.make_train_step`.
        augment_batch: see `mros_jax.training.recipe.build`.
        devices: to run on; None: all.

    Returns:
        A function that takes one step, waits for its end and returns its metrics.
    """
    config = config.copy_and_resolve_references()
    config.weights = "none"
    parts = recipe.build(config, num_classes, steps_per_epoch=100, augment_batch=augment_batch)
    mapped_step = parallel.MappedStep(parts.step, devices)
    state = parallel.replicate(parts.state, devices)

    def step() -> dict[str, jax.Array]:
        nonlocal state
        metrics: dict[str, jax.Array]
        state, metrics = mapped_step(state, data, batch)
        jax.block_until_ready((state, metrics))
        return metrics

    return step

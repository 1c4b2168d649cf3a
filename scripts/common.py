"""What the scripts share: a command line with a config, tables, and the step that they time."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mros_jax import console, parallel
from mros_jax.config import parse_config
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
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


def add_part(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """Add `--part`, a list with commas of what is measured; all of it by default."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [part for part in chosen if part not in parts]:
            raise argparse.ArgumentTypeError(
                f"no part {', '.join(unknown)}; there are {', '.join(parts)}"
            )
        return chosen

    parser.add_argument("--part", type=read, default=",".join(parts), help="any of %(default)s")


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


def run_child(module: str, words: Sequence[str], what: str, **environment: str) -> Any:
    """What a script prints on its last line, as JSON, in a process of its own; also for the log.

    Args:
        module: the script.
        words: its arguments.
        what: names the process.
        environment: variables that it has besides ours.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{what}: failed with exit code {done.returncode}, see above")
    got = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {got}", file=sys.stderr)
    return got


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


class Step:
    """The step that training runs, from random weights, on one batch over and over.

    Args:
        config: what is trained.
        num_classes: training identities.
        data: all images and labels on the devices, or None.
        batch: of the step, on the devices; see `mros_jax.training.step.make_train_step`.
        augment_batch: see `mros_jax.training.recipe.build`.
        devices: to run on; None: all.
    """

    def __init__(
        self,
        config: ConfigDict,
        num_classes: int,
        data: Any,
        batch: Any,
        *,
        augment_batch: Augment | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        config = config.copy_and_resolve_references()
        config.weights = "none"
        parts = recipe.build(config, num_classes, steps_per_epoch=100, augment_batch=augment_batch)
        self._mapped_step = parallel.MappedStep(parts.step, devices)
        self._state = parallel.replicate(parts.state, devices)
        self._data, self._batch = data, batch

    def start(self, batch: Any = None) -> tuple[Any, dict[str, jax.Array]]:
        """Begin one step, on another batch where one is given; state and metrics to wait for."""
        batch = self._batch if batch is None else batch
        self._state, metrics = self._mapped_step(self._state, self._data, batch)
        return self._state, metrics

    def __call__(self) -> dict[str, jax.Array]:
        """Take one step, wait for its end and return its metrics."""
        state, metrics = self.start()
        jax.block_until_ready((state, metrics))
        return metrics


class Training:
    """The training command in a process of its own, watched from outside; a context manager.

    Args:
        words: its arguments.
        workdir: of the run.
        cache: where it keeps compiled programs.
    """

    def __init__(self, words: Sequence[str], workdir: pathlib.Path, cache: pathlib.Path):
        self._command = [sys.executable, "-m", "mros_jax.train", *words, f"--workdir={workdir}"]
        self._environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}

    def __enter__(self) -> "Training":
        self._messages = tempfile.TemporaryFile("w+")
        self._since = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._messages.close()

    def wait_for(self, file: pathlib.Path) -> float:
        """Seconds from the start until a file has content.

        Raises:
            UserError: the training ended before.
        """
        while True:
            ended = self._process.poll() is not None
            if file.exists() and file.stat().st_size:
                return time.perf_counter() - self._since
            if ended:
                raise self._explain()
            time.sleep(0.01)

    def wait(self) -> float:
        """Seconds from the start to the end.

        Raises:
            UserError: it ended with an error.
        """
        if self._process.wait():
            raise self._explain()
        return time.perf_counter() - self._since

    def _explain(self) -> UserError:
        self._messages.seek(0)
        return UserError(f"the training stopped:\n{self._messages.read()}")

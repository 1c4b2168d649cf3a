"""Which systems take part in a campaign, and with which config."""

import argparse
import dataclasses
import difflib
import fnmatch
import logging
import pathlib
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
from mros_jax.runs.run import FREE_FIELDS

log = logging.getLogger(__name__)

PRESETS = ("full", "small")
# Changes of a recipe that change nothing about what its last state scores.
_HARMLESS = (
    *FREE_FIELDS,
    *("eval.every_epochs", "eval.rerank", "eval.rerank_options"),
)
_CHANGES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class System:
    """A variant of a config file.

    Attributes:
        name: `config.name`, as the paper's tables know it.
        file: as `--config` takes it, with the variant after a colon.
        changes: `--config.FIELD=VALUE` words that make of it what is trained.
    """

    name: str
    file: str
    changes: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """What the programs of this project take as its config."""
        return (f"--config={self.file}", *self.changes)

    def read(self) -> ConfigDict:
        """The config that is trained."""
        config, _ = configs.parse_config(self.words)
        assert config is not None
        return config

    def list_changes(self) -> tuple[str, ...]:
        """In one entry, what makes its recipe another than that of its file; () where nothing does.

        What changes nothing about how its last state scores is left out.
        """
        changed = [word.removeprefix("--config.") for word in self.changes]
        changed = [word for word in changed if not _is_harmless(word)]
        if not changed:
            return ()
        more = len(changed) - _CHANGES_SHOWN
        shown = ", ".join(changed[:_CHANGES_SHOWN]) + f" and {more} more" * (more > 0)
        return (f"another recipe ({shown})",)


def _is_harmless(change: str) -> bool:
    name, _, value = change.partition("=")
    if name == "weights":  # a file of ImageNet weights, wherever it lies
        return value != "none"
    return any(name == field or name.startswith(f"{field}.") for field in _HARMLESS)


def find_systems(files: Iterable[str | pathlib.Path] = ()) -> tuple[System, ...]:
    """Every variant of every config.

    Args:
        files: config files; none: all of this project.

    Raises:
        UserError: a file that is no config, or two systems of one name.
    """
    systems: dict[str, System] = {}
    for file in files or configs.list_configs():
        for variant in configs.read_variants(file):
            text = f"{file}:{variant}" if variant else str(file)
            name = configs.read(file, variant or None).name
            if name in systems:
                raise UserError(f"{systems[name].file} and {text} are both named {name}")
            systems[name] = System(name, text)
    return tuple(systems.values())


def choose(systems: Sequence[System], patterns: Sequence[str]) -> tuple[System, ...]:
    """The systems of these names, in their own order; all where no name is given.

    Args:
        systems: to choose from.
        patterns: names, in which * stands for anything.

    Raises:
        UserError: a name that is none; lists those that there are.
    """
    names = [system.name for system in systems]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"no system is named {pattern}{hint}; there are {', '.join(names)}")
    return tuple(
        system
        for system in systems
        if not patterns or any(fnmatch.fnmatch(system.name, pattern) for pattern in patterns)
    )


def prepare(
    systems: Sequence[System],
    *,
    preset: str = "full",
    epochs: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[System, ...]:
    """The systems with the changes that a campaign makes of their recipes.

    Args:
        systems: as `find_systems` returns them.
        preset: "full": the recipes as they are; "small": laptop-sized, on embedded data, see
            `mros_jax.config.shrink`.
        epochs: of every run, in place of its recipe's; None: those.
        overrides: `--config.FIELD=VALUE` words, for those systems that have the field.

    Raises:
        UserError: a field that no system has, or a value that it cannot take.
    """
    configs.check_choice("preset", preset, PRESETS)
    named = {word: word.partition("=")[0].removeprefix("--config.") for word in overrides}
    lacking: dict[str, list[str]] = {word: [] for word in named}
    prepared = []
    for system in systems:
        recipe, config = system.read(), system.read().unlock()
        if preset == "small":
            configs.shrink(config)
        own = [word for word, name in named.items() if configs.has_field(config, name)]
        for word in named.keys() - set(own):
            lacking[word].append(system.name)
        config.lock()
        configs.apply_overrides(config, own)
        if epochs is not None:
            steps = config.num_steps and epochs * _count_steps(config)
            configs.shorten(config, epochs=epochs, steps=steps)
            configs.apply_overrides(config, own)
        changes = configs.list_changes(recipe, config)
        prepared.append(dataclasses.replace(system, changes=changes))
    for word, name in named.items():
        if len(lacking[word]) == len(prepared):
            configs.check_field(systems[0].read(), name)
        if lacking[word]:
            log.info("%s is not for %s, which lack the field", word, ", ".join(lacking[word]))
    return tuple(prepared)


def _count_steps(config: ConfigDict) -> int:
    """Training steps of an epoch."""
    labels = configs.load_dataset(config).train.labels
    assert labels is not None
    return make_sampler(config.batch.to_dict()).steps(labels)


def add_arguments(parser: argparse.ArgumentParser, *, preset: str) -> None:
    """Add the arguments that choose systems and change their recipes."""
    parser.add_argument(
        "--systems",
        type=_split,
        default=[],
        metavar="A,B",
        help="names of systems, in which * stands for anything (default: all)",
    )
    parser.add_argument(
        "--configs",
        type=_split,
        default=[],
        metavar="A.py,B.py",
        help="config files to take them from (default: this project's)",
    )
    parser.add_argument("--seeds", type=_read_seeds, default="0,1,2", help="default: %(default)s")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=preset,
        help="full: the recipes as they are; small: small networks and images, the embedded data, "
        "32 epochs (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=console.count, metavar="N", help="of every run, in place of its recipe's"
    )
    parser.epilog = "--config.FIELD=VALUE sets a field of every config that has it"


def read_arguments(
    args: argparse.Namespace, rest: Sequence[str]
) -> tuple[tuple[System, ...], list[str]]:
    """The systems that a command line chooses, and its words that are not known here.

    Args:
        args: of a parser with `add_arguments`.
        rest: what that parser did not know.

    Raises:
        UserError: as `find_systems`, `choose` and `prepare`.
    """
    overrides, rest = configs.split_overrides(rest)
    chosen = choose(find_systems(args.configs), args.systems)
    prepared = prepare(chosen, preset=args.preset, epochs=args.epochs, overrides=overrides)
    return prepared, list(rest)


def _split(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _read_seeds(text: str) -> list[int]:
    seeds = list(dict.fromkeys(int(word) for word in _split(text)))
    if not seeds or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text} are not numbers of 0 or more, with commas")
    return seeds

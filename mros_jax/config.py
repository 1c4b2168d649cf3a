"""Configs: read from a file, changed on the command line."""

import argparse
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from mros_jax.errors import NotFoundError, UserError


def read(path: str | pathlib.Path, arg: str | None = None) -> ConfigDict:
    """Read a config file: what its `get_config(arg)` returns, locked.

    Args:
        path: a Python file, such as `configs/mros.py`.
        arg: what a user writes after a colon, to choose a variant or a data set.

    Raises:
        NotFoundError: there is no such file.
        UserError: the file is no config, or does not know `arg`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise NotFoundError(f"config {path} does not exist; configs/ holds those of this project")
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
    config = module.get_config(arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {path}: get_config() returned no ConfigDict but {config!r}")
    return config.lock()


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
    overrides, rest = _split_overrides(others)
    if known.config is None:
        if overrides:
            raise UserError(f"{overrides[0]} changes a config, and no --config FILE is given")
        return None, rest
    path, _, arg = known.config.partition(":")
    config = read(path, arg or None)
    apply_overrides(config, overrides)
    return config, rest


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config.FIELD=VALUE` (also where the value is the next argument), and everything else."""
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
        _check_field(config, word.partition("=")[0].removeprefix("--config."))
    values = flags.FlagValues()
    arguments = ["", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).removeprefix("flag ")) from error


def _check_field(config: ConfigDict, name: str) -> None:
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

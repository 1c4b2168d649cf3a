"""What a user can mend is a `UserError`; everything else is a bug and keeps its traceback."""

from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Input, options or surroundings that a user can mend.

    The message is all that a user sees of it: it names the file, line or field, the value seen, the
    value expected and the way out. Programs end with it in one line and exit code 2
    (`mros_jax.console.run`).
    """


class NotFoundError(UserError, FileNotFoundError):
    """A file or directory that a user names is not there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DivergedError(UserError, FloatingPointError):
    """The loss of a training run became NaN or infinite."""


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        UserError: names the field, its value and the choices.
    """
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(known)}")

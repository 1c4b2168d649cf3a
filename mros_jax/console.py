"""Where every program of this project meets its user: messages, progress bars, errors.

if __name__ == "__main__":
    sys.exit(console.run(main))
"""

import argparse
import contextlib
import errno
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging as absl_logging
from tqdm import tqdm

from mros_jax.errors import UserError

MISUSE = 2  # what a user can mend; argparse ends with it, too
INTERRUPTED = 128 + 2  # SIGINT, as shells count
BROKEN_PIPE = 128 + 13  # SIGPIPE

_GARBAGE_AFTER = 50_000  # new objects; Python's own is 700, or 2,000 in newer ones

_LOG_INTERVAL = 30.0  # seconds between the lines of a progress bar that goes into a file

# What a user can mend about a file. Another OSError, such as EBADF, is a bug.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MENDABLE = (
    *_FULL,
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EIO, errno.ESTALE, errno.ETXTBSY, errno.EBUSY),
)
# tensorstore, below orbax, says in a ValueError what it was at, and quotes the system.
_OF_TENSORSTORE = "[tensorstore_spec="
_QUOTED_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")
_QUOTED_PATH = re.compile(r'"(/[^"]+)"')


def run(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run a program; the one place where errors end.

    What a user can mend is one line on standard error. Everything else is a bug and keeps its
    traceback, however long the program has run.

    Args:
        main: takes the arguments and returns the exit code, None for 0. It raises what is wrong.
        argv: the arguments, without the program's name; None for those of the process.

    Returns:
        The exit code: that of `main`; 2 for what a user can mend; 130 after Ctrl-C; 141 where
        nobody reads the output any more.
    """
    # Pictures are drawn into files. The name that a notebook's shell passes on may not be there.
    os.environ["MPLBACKEND"] = "agg"
    sys.unraisablehook = _report_unraisable
    # JAX makes millions of objects while it traces a network, next to none of them garbage.
    gc.set_threshold(_GARBAGE_AFTER)
    show_messages()
    try:
        code = main(argv)
        sys.stdout.flush()
        return code or 0
    except SystemExit as end:  # argparse has told what is wrong, or printed its help
        return int(end.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _end_output()
        return BROKEN_PIPE
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr)
        _end_output()
        return MISUSE


def _report_unraisable(report: Any) -> None:
    # What is left of a read or write of tensorstore's that has failed and been told already.
    if str(report.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(report)


def _end_output() -> None:
    """Drop what standard output does not take, which Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str | None:
    """What a user can do about an error, in one line (which a list may follow); None for a bug."""
    for link in _chain(error):
        if isinstance(link, UserError):
            return str(link)
        if isinstance(link, MemoryError):
            detail = f" ({link})" if str(link) else ""
            return f"out of memory{detail}; close other programs, or take smaller batches"
        if isinstance(link, OSError) and link.errno in _MENDABLE:
            return _explain_os_error(link.errno, link.filename)
        if (quoted := _QUOTED_ERROR.search(str(link))) and int(quoted[1]) in _MENDABLE:
            path = _QUOTED_PATH.search(str(link))
            return _explain_os_error(int(quoted[1]), path[1] if path else None)
    # Python names the first of two errors as the context of the second. Only a full disk is sure
    # to be the cause of whatever comes after it.
    for link in _chain(error, with_context=True):
        if isinstance(link, OSError) and link.errno in _FULL:
            return _explain_os_error(link.errno, link.filename)
    return None


def _explain_os_error(number: int, filename: Any) -> str:
    name = os.fsdecode(filename) if isinstance(filename, str | bytes | os.PathLike) else "output"
    advice = "; make room, then give the same command again" if number in _FULL else ""
    return f"{name}: {os.strerror(number)}{advice}"


def _chain(error: BaseException, with_context: bool = False) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (link.__context__ if with_context else None)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of asyncio's is not of an error that ends the program in one line anyhow.

    tensorstore's reads and writes are tasks. The error of one is told; of those that nobody has
    waited for asyncio logs the errors, whenever Python comes to throw them away.
    """
    error = record.exc_info[1] if record.exc_info else None
    return error is None or (explain(error) is None and _OF_TENSORSTORE not in str(error))


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def count(text: str) -> int:
    """A number of things on a command line, at least 1: a `type` of argparse's."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def show_messages() -> None:
    """Show the messages of this project and of JAX on standard error, above any progress bar."""
    # orbax tells every file that it touches, and logs the errors that it raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").addFilter(_is_news)
    for name, level in (("mros_jax", logging.INFO), ("jax", logging.WARNING)):
        logger = logging.getLogger(name)
        for other in list(logger.handlers):  # JAX to 0.8 has one of its own
            if type(other) is logging.StreamHandler:
                logger.removeHandler(other)
        if not any(isinstance(handler, _Handler) for handler in logger.handlers):
            handler = _Handler()
            form = logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S")
            handler.setFormatter(form)
            logger.addHandler(handler)
            logger.setLevel(level)
            logger.propagate = False


class _Lines:
    """Standard error as tqdm sees it where that is a file: a line of its own for each state."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Any = None, **options: Any) -> Any:
    """A `tqdm` progress bar; where standard error is no terminal, a line every half minute.

    Args:
        iterable: what is gone through, or None where the bar is moved by its `update`.
        **options: of `tqdm.tqdm`.
    """
    if not sys.stderr.isatty():
        options |= {
            "file": _Lines(),
            "ascii": True,
            "delay": _LOG_INTERVAL,
            "mininterval": _LOG_INTERVAL,
            "maxinterval": _LOG_INTERVAL,
        }
    return tqdm(iterable, **options)

"""One writer at a time for a directory."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from mros_jax.errors import UserError

_ADVICE = "wait for it or end it, or give another --workdir"


@contextlib.contextmanager
def hold(path: pathlib.Path, advice: str = _ADVICE) -> Iterator[None]:
    """Hold the lock file `path`, which is removed at the end.

    The system releases the lock of a process that dies, so a file left behind by one that was
    killed locks nobody out.

    Args:
        path: the lock file.
        advice: how the error ends: the way out.

    Raises:
        UserError: another process holds it; says which.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor):
                raise UserError(_describe(path, advice))
            # Its former holder may have removed the file between the two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check(path: pathlib.Path) -> None:
    """Refuse where another process holds the lock file; leaves no trace.

    Raises:
        UserError: another process holds it; says which.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        if not _lock(descriptor):
            raise UserError(_describe(path))
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some network file systems are
        return True
    return True


def _describe(path: pathlib.Path, advice: str = _ADVICE) -> str:
    text = f"{path.parent} is in use by another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(path.read_text())
        text += f": {holder['pid']} on {holder['host']}, since {holder['since']}"
    return f"{text}; {advice}"

"""Files that are whole or not there, JSON, and where this project keeps what it can make again."""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from mros_jax.errors import NotFoundError, UserError


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes its name only when it is complete and on disk.

    It is written under a temporary name in the same directory, synced and renamed. Whatever goes
    wrong, a reader sees the old file or the new one, and no temporary file stays.

    Args:
        path: the file.
        mode: "w" (UTF-8 text) or "wb".

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def make_directory_atomically(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Fill a directory that takes its name only when all that it is to hold is in it.

    It is filled under a hidden temporary name beside it and renamed. Whatever goes wrong, nothing
    is there under its name, and the temporary one is removed (unless the process is killed).

    Args:
        path: the directory; its parents are made. It must not exist, or be empty.

    Yields:
        The directory to fill.

    Raises:
        OSError: it cannot be written, or something is there; the error names `path`.
    """
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work whose outcome it is to hold.

    Raises:
        UserError: it is a directory, or its own directory is missing or cannot be written.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; expected the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: {path.parent} is no directory; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission in {path.parent}")


def find_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with write_atomically(path) as file:
        file.write(json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        NotFoundError: there is none.
        UserError: it is empty or no JSON.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise UserError(f"{path} is empty; expected JSON")
        return json.loads(text)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file, none where there is no file.

    A last line cut short by a killed writer is left out.

    Raises:
        UserError: another line is no JSON object.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: {line[:80]!r}")
        records.append(record)
    return records


def cache_directory(name: str) -> pathlib.Path:
    """The directory `mros_jax/NAME` in the user's cache directory.

    That is $XDG_CACHE_HOME, or ~/.cache, or a directory of the user's own in the directory for
    temporary files where there is no home (as in many containers). Names in use: "images" (decoded
    data sets), "weights" (ImageNet weights), "xla" (compiled programs). Each may be deleted at any
    time.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(root) / "mros_jax" / name
    try:
        home = pathlib.Path.home()
    except RuntimeError:  # neither $HOME nor an entry in the password database
        return pathlib.Path(tempfile.gettempdir()) / f"cache-{os.getuid()}" / "mros_jax" / name
    return home / ".cache" / "mros_jax" / name

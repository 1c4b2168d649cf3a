"""Files that are whole or not there; where things are kept without a home."""

import errno
import os
import pathlib
import tempfile

import pytest

from mros_jax import files
from mros_jax.errors import NotFoundError, UserError


def test_a_failing_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def write_half():
        with files.write_atomically(path) as file:
            file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "data"

    def fill(name, error=None):
        with files.make_directory_atomically(path) as directory:
            (directory / name).write_text("")
            if error:
                raise error

    with pytest.raises(RuntimeError):
        fill("half", RuntimeError())
    assert list(path.parent.iterdir()) == []
    fill("whole")
    with pytest.raises(OSError, match="not empty"):
        fill("other")
    assert [p.name for p in path.parent.rglob("*")] == ["data", "whole"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_json(tmp_path / "a.json", {})
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("{", "is not JSON"), ("\xff", "is not JSON")]
)
def test_damaged_json_is_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"a\.json {message}"):
        files.read_json(path)


def test_missing_json(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.json does not exist"):
        files.read_json(tmp_path / "none.json")
    assert files.read_jsonl(tmp_path / "none.jsonl") == []


def test_a_line_cut_short_is_left_out_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\nx\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        files.read_jsonl(path)


def test_a_user_without_a_home(monkeypatch, tmp_path):
    """As in many containers: no $HOME, and no entry in the password database."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    expected = tmp_path / f"cache-{os.getuid()}" / "mros_jax" / "images"
    assert files.cache_directory("images") == expected

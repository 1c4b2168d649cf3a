"""Where errors end: one line for what a user can mend, a traceback for a bug."""

import errno
import logging
import os
import subprocess
import sys

import pytest

from mros_jax import console
from mros_jax.errors import NotFoundError, UserError


def raising(error, cause=None):
    def main(argv):
        raise error from cause

    return main


def chained(first, second):
    """`second`, raised while `first` was handled."""

    def main(argv):
        try:
            raise first
        except type(first):
            raise second  # noqa: B904

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x is 3; expected 4"), "error: x is 3; expected 4"),
        (NotFoundError("no /nowhere"), "error: no /nowhere"),
        (PermissionError(errno.EACCES, "no", "/a/b"), "error: /a/b: Permission denied"),
        (OSError(errno.EROFS, "no", "/a/b"), "error: /a/b: Read-only file system"),
        (OSError(errno.ENAMETOOLONG, "no", "/a"), "error: /a: File name too long"),
        (NotADirectoryError(errno.ENOTDIR, "no", b"/a/b"), "error: /a/b: Not a directory"),
        (MemoryError(), "error: out of memory; close other programs"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, line, capsys):
    for wrapped in (raising(error), raising(RuntimeError("orbax"), error)):
        assert console.run(wrapped) == 2
        told = capsys.readouterr().err
        assert told.startswith(line)
        assert told.count("\n") == 1


def test_a_full_disk_is_told_by_whatever_it_ends_in(capsys):
    full = OSError(errno.ENOSPC, "no", "/run/x")
    for main in (
        raising(full),
        raising(RuntimeError("a"), full),
        chained(full, AttributeError("closed")),
        raising(
            ValueError("RESOURCE_EXHAUSTED: Error writing \"/run/x\": No [os_error_code='28']")
        ),
    ):
        assert console.run(main) == 2
        assert capsys.readouterr().err.startswith("error: /run/x: No space left on device; make")


@pytest.mark.parametrize(
    "main",
    [
        raising(ValueError("Incompatible shapes")),
        raising(RuntimeError("bug")),
        raising(OSError(errno.EBADF, "no")),
        chained(UserError("mended already"), KeyError("bug")),
        chained(FileNotFoundError(errno.ENOENT, "no", "/a"), TypeError("bug")),
    ],
)
def test_a_bug_keeps_its_traceback(main):
    with pytest.raises(Exception, match=r"Incompatible|bug|no"):
        console.run(main)


def test_exit_codes(capsys):
    assert console.run(lambda argv: None) == 0
    assert console.run(lambda argv: 1) == 1
    assert console.run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def program(code, *, environment=None, **options):
    header = "import sys\nfrom mros_jax import console\n"
    return subprocess.run(
        [sys.executable, "-c", header + code],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        **options,
    )


def test_nobody_reads_any_more():
    code = "import sys; from mros_jax import console\n"
    code += "sys.exit(console.run(lambda argv: [print(i) for i in range(10**5)] and 0))"
    shell = f"'{sys.executable}' -c '{code}' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "141"]
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_below_standard_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from mros_jax import console\n"
                "sys.exit(console.run(lambda argv: print('x')))",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_progress_in_a_log_file_is_a_line_now_and_then():
    code = """
import time
console._LOG_INTERVAL = 0.5
start = time.monotonic()
for _ in console.progress(range(400), desc="work"):
    time.sleep(0.005)
print(time.monotonic() - start)
for _ in console.progress(range(10), desc="short"):
    pass
"""
    done = program(code)
    lines = done.stderr.splitlines()
    assert 2 <= len(lines) <= 2 + float(done.stdout) / 0.5
    assert all(line.startswith("work: ") for line in lines)


def test_jax_is_heard():
    code = "import jax, logging\nconsole.show_messages(); console.show_messages()\n"
    code += "logging.getLogger('jax._src.xla_bridge').warning('An NVIDIA GPU may be present')"
    told = program(code).stderr
    assert told.count("An NVIDIA GPU may be present") == 1


def test_messages_are_shown_once(capsys):
    console.show_messages()
    console.show_messages()
    logging.getLogger("mros_jax.anything").info("hello")
    assert capsys.readouterr().err.count("hello") == 1


def test_a_notebooks_drawing_backend_does_no_harm():
    code = "import mros_jax.report\nconsole.run(lambda argv: None)\nimport matplotlib"
    backend = {"MPLBACKEND": "module://nowhere.backend"}
    done = program(code, environment=backend)
    assert done.returncode == 0, done.stderr


def test_commands_seldom_look_for_garbage():
    code = "import gc\nconsole.run(lambda argv: print(gc.get_threshold()[0]))"
    assert int(program(code).stdout) > 10 * 2000  # Python's own is 700 or 2,000


def test_what_asyncio_says_of_reads_and_writes_is_told_once(capsys):
    def fail(error):
        logger = logging.getLogger("asyncio")
        logger.error("Task exception was never retrieved", exc_info=error)

    console.show_messages()
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("asyncio").addHandler(handler)
    try:
        fail(OSError(errno.ENOSPC, "full"))
        fail(ValueError("OUT_OF_RANGE: Error reading params [tensorstore_spec='{}']"))
        assert capsys.readouterr().err == ""
        fail(KeyError("a bug"))
        assert "a bug" in capsys.readouterr().err
    finally:
        logging.getLogger("asyncio").removeHandler(handler)

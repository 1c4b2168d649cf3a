"""Load a page in headless Chromium."""

import os
import pathlib
import shutil
import subprocess
import tempfile

from mros_jax.errors import NotFoundError

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
# A frame, because a window of Chromium cannot be as narrow as a phone.
FRAME = """<body style="margin:0">
<iframe src="{source}" style="width:{width}px;height:{height}px;border:0"></iframe></body>"""


def find_chromium() -> str | None:
    """The browser's executable, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def run_chromium(
    page: pathlib.Path, *flags: str, dark: bool = False
) -> subprocess.CompletedProcess[str]:
    """Load a page in a new headless browser.

    Args:
        page: the file.
        *flags: of Chromium, such as `--screenshot=FILE`.
        dark: as seen by a reader who prefers dark pages.

    Raises:
        NotFoundError: there is no browser.
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *make_command(profile, "--virtual-time-budget=4000"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *flags,
            page.absolute().as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def make_command(profile: str, *flags: str) -> list[str]:
    """What starts a headless browser, whose files are in the directory `profile`.

    Raises:
        NotFoundError: there is none.
    """
    executable = find_chromium()
    if executable is None:
        raise NotFoundError(f"none of {', '.join(NAMES)} is installed")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    return [executable, *_FLAGS, *sandbox, f"--user-data-dir={profile}", *flags]

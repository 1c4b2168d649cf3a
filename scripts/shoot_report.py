"""Takes a picture of a run's report with headless Chromium.

    python scripts/shoot_report.py runs/demo --out report.png
    python scripts/shoot_report.py runs/demo --out report.png --width 390 --height 3000 --dark
    python scripts/shoot_report.py runs/demo --out docs/images/ranked_lists.png --lists 0 4 8

`--lists` shows only these queries of the ranked lists, counted from 0 down the page.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

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
    "--virtual-time-budget=4000",
)
# A frame, because a window of Chromium cannot be as narrow as a phone.
FRAME = """<body style="margin:0">
<iframe src="{source}" style="width:{width}px;height:{height}px;border:0"></iframe></body>"""

_ONLY_LISTS = """<style>
body > *, main > *, #lists > * { display: none; }
main, #lists { display: block !important; }
main { padding: 6px; }
section, .query { margin: 6px 0 !important; }
.query.shown { display: grid !important; }
</style><script>
addEventListener("load", () => {
  const all = document.querySelectorAll(".query");
  for (const i of [NUMBERS]) all[i]?.classList.add("shown");
});
</script>"""


def find_chromium() -> str | None:
    """The browser's executable, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def run_chromium(
    page: pathlib.Path, *flags: str, dark: bool = False
) -> subprocess.CompletedProcess[str]:
    """Loads a page in a new headless browser.

    Raises:
        FileNotFoundError: there is no browser.
        subprocess.CalledProcessError: it failed.
    """
    executable = find_chromium()
    if executable is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            executable,
            *_FLAGS,
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *flags,
            page.absolute().as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def shoot(
    report: pathlib.Path,
    out: pathlib.Path,
    *,
    width: int = 1280,
    height: int = 2000,
    dark: bool = False,
    lists: Sequence[int] = (),
) -> None:
    """Writes the top of a report, or only some of its ranked lists, as a PNG.

    Args:
        report: the page.
        out: the picture.
        width: of the window, in pixels.
        height: of the window; with `lists`, the most that is shown.
        dark: as seen by a reader who prefers dark pages.
        lists: numbers of the queries to show, and nothing else; empty: the whole page.
    """
    with tempfile.TemporaryDirectory() as directory:
        source = report.absolute()
        if lists:
            text = report.read_text(encoding="utf-8")
            added = _ONLY_LISTS.replace("NUMBERS", ", ".join(map(str, lists))) + "</body>"
            source = pathlib.Path(directory, "lists.html")
            source.write_text(text.replace("</body>", added), encoding="utf-8")
        frame = pathlib.Path(directory, "frame.html")
        frame.write_text(FRAME.format(source=source.as_uri(), width=width, height=height))
        picture = pathlib.Path(directory, "picture.png")
        size = f"--window-size={width},{height}"
        run_chromium(frame, f"--screenshot={picture}", size, dark=dark)
        with Image.open(picture) as opened:
            image = opened.convert("RGB")
    if lists:
        pixels = np.asarray(image)
        rows = np.flatnonzero((pixels != pixels[-1, 0]).any((1, 2)))
        image = image.crop((0, 0, width, int(rows.max(initial=0)) + 9))
        image = image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take a picture of a run's report.")
    parser.add_argument("run", type=pathlib.Path, help="directory of the run")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=2000, help="of the window, in pixels")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--lists", type=int, nargs="+", default=[], help="only these queries")
    args = parser.parse_args()
    report = args.run / "report.html"
    if not report.is_file():
        print(f"error: no {report}; python -m mros_jax.report {args.run} makes it", file=sys.stderr)
        return 1
    try:
        shoot(
            report,
            args.out,
            width=args.width,
            height=args.height,
            dark=args.dark,
            lists=args.lists,
        )
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

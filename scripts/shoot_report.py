"""Take a picture of a run's report with headless Chromium.

    python -m scripts.shoot_report --run runs/demo --out report.png
    python -m scripts.shoot_report --run runs/demo --out report.png --width 390 --height 3000 --dark
    python -m scripts.shoot_report --run runs/demo --out docs/images/ranked_lists.png --lists 0 4 8

`--lists` shows only these queries of the ranked lists, counted from 0 down the page.
"""

import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mros_jax import console
from mros_jax.errors import NotFoundError
from mros_jax.files import write_atomically
from scripts import common
from scripts.chromium import FRAME, run_chromium

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


def shoot(
    report: pathlib.Path,
    out: pathlib.Path,
    *,
    width: int = 1280,
    height: int = 2000,
    dark: bool = False,
    lists: Sequence[int] = (),
) -> None:
    """Write the top of a report, or only some of its ranked lists, as a PNG.

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
    with write_atomically(out, "wb") as file:
        image.save(file, format="PNG", optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="directory of the run")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG to write")
    parser.add_argument("--width", type=console.count, default=1280, help="of the window, pixels")
    parser.add_argument("--height", type=console.count, default=2000, help="of the window, pixels")
    parser.add_argument("--dark", action="store_true", help="for readers who prefer dark pages")
    parser.add_argument("--lists", type=int, nargs="+", default=[], help="only these queries")
    args = parser.parse_args(argv)
    report = args.run / "report.html"
    if not report.is_file():
        raise NotFoundError(f"no {report}; python -m mros_jax.report {args.run} makes it")
    shoot(
        report,
        args.out,
        width=args.width,
        height=args.height,
        dark=args.dark,
        lists=args.lists,
    )
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

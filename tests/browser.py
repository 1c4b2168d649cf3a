"""A page in headless Chromium: what it looks like from the inside, and what it complained about."""

import html
import json
import pathlib
import re
from typing import Any

from scripts.chromium import FRAME, run_chromium

# Runs before anything else on the page, and tells the frame's parent what it saw.
_PROBE = """<script>
const seen = {errors: []};
addEventListener("error", (e) => seen.errors.push(e.message || `${e.target.tagName} failed`), true);
addEventListener("unhandledrejection", (e) => seen.errors.push(String(e.reason)));
for (const level of ["error", "warn"]) {
  console[level] = (...args) => seen.errors.push(args.join(" "));
}
addEventListener("load", () => {
  const button = document.querySelector(".ranking button");
  if (button) button.click();
  seen.dialog = document.querySelector("dialog[open] .slot")?.innerText ?? null;
  seen.images = [...document.images].map((image) => image.naturalWidth);
  seen.charts = Object.fromEntries([...document.querySelectorAll("svg[data-chart]")].map((svg) => {
    const box = svg.getBoundingClientRect();
    return [svg.dataset.chart, [box.width, box.height, svg.querySelectorAll("path, use").length]];
  }));
  seen.width = innerWidth;
  seen.scrollWidth = document.documentElement.scrollWidth;
  seen.background = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  seen.fetched = performance.getEntriesByType("resource").map((e) => e.name)
    .filter((name) => !name.startsWith("data:"));
  parent.postMessage(seen, "*");
});
</script>"""
_LISTENER = """<script>addEventListener("message", (e) => {
  const pre = document.createElement("pre");
  pre.id = "seen";
  pre.textContent = JSON.stringify(e.data);
  document.body.append(pre);
});</script>"""


def inspect(
    page: pathlib.Path, directory: pathlib.Path, *, width: int, dark: bool = False
) -> dict[str, Any]:
    """Loads a page in a window of some width, and presses the first picture of a ranked list.

    Returns:
        `errors` (of scripts, of loading, and whatever was written to the console), `images` (their
        natural widths), `charts` (name -> width, height, number of shapes), `width`, `scrollWidth`,
        `background`, `dialog` (the text of the open dialog) and `fetched` (addresses).
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    (directory / "page.html").write_text(text.replace("<head>", "<head>" + _PROBE, 1))
    frame = directory / "frame.html"
    frame.write_text(_LISTENER + FRAME.format(source="page.html", width=width, height=900))
    done = run_chromium(frame, "--dump-dom", f"--window-size={width + 50},1000", dark=dark)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not finish loading:\n{done.stdout[:2000]}\n{done.stderr}"
    seen: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    seen["errors"] += [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return seen

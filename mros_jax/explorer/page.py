"""The page itself: gradio's controls around what `explorer.html` makes of an `Exploration`.

Pictures are within the page, as data: the server has no address under which it gives out a file of
the run, or any other.
"""

import base64
import contextlib
import functools
import html
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mros_jax.errors import UserError
from mros_jax.explorer.exploration import KINDS, ORDERS, Exploration
from mros_jax.inspection.markup import make_environment

HOST = "127.0.0.1"
_ANY = "any"
_MOST_QUERIES = 200  # in the list to choose from
_LARGEST_UPLOAD = "32mb"
_POINTS = 300  # of a line of the chart
_STYLES = (
    pathlib.Path(__file__).parents[1] / "inspection" / "lists.css",
    pathlib.Path(__file__).parent / "explorer.css",
)
_SCRIPT = pathlib.Path(__file__).parents[1] / "inspection" / "lists.js"
# A browser that keeps to this asks nobody else for anything, whatever gradio's page may hold.
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def load_views() -> Any:
    """The macros of `explorer.html` as functions."""
    return make_environment("mros_jax.explorer").get_template("explorer.html").module


def make_page(runs: Sequence[Exploration]) -> Any:
    """The page of a run, or of a run and another to compare with, as `gradio.Blocks`."""
    gr = import_gradio()
    run = runs[0]
    views = load_views()
    pids, camids = (_list_values(run.features[f"query_{x}"]) for x in ("pids", "camids"))

    def find(pid: str, camid: str, order: Any) -> Any:
        who, where = (None if text == _ANY else int(text) for text in (pid, camid))
        found = run.find_queries(who, where, order)
        shown = found[:_MOST_QUERIES].tolist()
        choices = [(run.describe_query(row), row) for row in shown]
        label = f"Query ({len(found):,} found"
        label += f", the first {_MOST_QUERIES})" if len(found) > _MOST_QUERIES else ")"
        return gr.update(choices=choices, value=shown[0] if shown else None, label=label)

    @_tell
    def show_query(query: int | None, top: int) -> str:
        if query is None:
            raise UserError("no query has this identity in this camera; choose others")
        shown = [(own.title, own.edges, own.list_query(query, top)) for own in runs]
        return str(views.query_view(shown))

    @_tell
    def show_upload(file: str | None, top: int) -> str:
        if file is None:
            return ""
        path = pathlib.Path(file)
        data = path.read_bytes()
        shown = [(own.title, own.edges, own.list_upload(data, path.name, top)) for own in runs]
        return str(views.query_view(shown, known=False))

    @_tell
    def show_threshold(threshold: float) -> str:
        scores = run.verification
        low, high = (float(scores.thresholds[i]) for i in (0, -1))
        chosen = np.linspace(0, len(scores.thresholds) - 1, _POINTS).round().astype(int)
        x = 600 * (scores.thresholds[chosen] - low) / max(high - low, 1e-30)
        lines = [_join(x, 200 - 200 * rate[chosen]) for rate in (scores.fpr, scores.fnr)]
        errors = run.count_errors(threshold)
        at = f"{600 * (errors.threshold - low) / max(high - low, 1e-30):.1f}"
        return str(views.threshold_view(errors, scores, *lines, at))

    def open_thresholds() -> tuple[Any, str]:
        try:
            scores = run.verification
        except UserError:
            return gr.update(), show_threshold(0.0)
        low, high = (float(scores.thresholds[i]) for i in (0, -1))
        digits = 3 - math.floor(math.log10(max(high - low, 1e-30)))  # 1,000 to 10,000 steps
        low, high, start = (round(x, digits) for x in (low, high, scores.eer_threshold))
        step = 10.0**-digits
        slider = gr.update(minimum=low, maximum=high + step, step=step, value=start)
        return slider, show_threshold(start)

    @_tell
    def show_map(what: Any) -> str:
        placed = run.map_descriptors(what)
        labels = sorted({point["label"] for point in placed["points"]})
        # Steps of the golden angle: neighbours differ, however many there are.
        colors = {label: round(137.508 * i % 360, 1) for i, label in enumerate(labels)}
        return str(views.map_view(placed, colors, {"identity": "pid"}.get(what, what)))

    @_tell
    def show_pairs(first: int) -> str:
        groups = {kind: run.list_hard_pairs(kind, first) for kind in KINDS}
        counts = {kind: len(run.hard_pairs[kind].queries) for kind in KINDS}
        table = base64.b64encode(run.write_hard_pairs().encode()).decode()
        link = f"data:text/csv;charset=utf-8;base64,{table}"
        return str(views.pairs_view(run.edges, groups, link, counts))

    # No function is an address of its own for other programs.
    private: Any = {"api_visibility": "private", "show_progress": "minimal"}
    plain: Any = {"apply_default_css": False}  # gradio's would color our text
    with gr.Blocks(title=f"{run.title} - explorer", analytics_enabled=False) as page:
        names = " against ".join(own.title for own in runs)
        title = f"<h1>Explorer</h1><p>{html.escape(names)}</p>"
        gr.HTML(title + str(views.dialog()), elem_classes="page-title", **plain)
        with gr.Tab("Ranked lists"):
            with gr.Row():
                pid = gr.Dropdown([_ANY, *pids], value=_ANY, label="Identity")
                camid = gr.Dropdown([_ANY, *camids], value=_ANY, label="Camera")
                order = gr.Dropdown(list(ORDERS), value=ORDERS[0], label="Order")
                top = gr.Slider(5, 50, value=10, step=5, label="Places")
            query = gr.Dropdown([], label="Query")
            listed = gr.HTML(elem_id="listed", **plain)
        with gr.Tab("Upload"):
            with gr.Row():
                upload = gr.File(label="A picture of a person", type="filepath", height=140)
                places = gr.Slider(5, 50, value=10, step=5, label="Places")
            found = gr.HTML(elem_id="found", **plain)
        with gr.Tab("Threshold") as thresholds:
            threshold = gr.Slider(0, 1, label="Threshold", elem_id="threshold")
            errors = gr.HTML(elem_id="errors", **plain)
        with gr.Tab("Map") as maps:
            what = gr.Radio(["camera", "identity"], value="camera", label="Colored by")
            placed = gr.HTML(elem_id="placed", **plain)
        with gr.Tab("Hard pairs") as hard:
            first = gr.Slider(10, 100, value=20, step=10, label="Pairs of each kind")
            pairs = gr.HTML(elem_id="pairs", **plain)

        gr.on(
            [page.load, pid.change, camid.change, order.change],
            find,
            [pid, camid, order],
            query,
            **private,
        )
        gr.on([query.change, top.change], show_query, [query, top], listed, **private)
        gr.on([upload.change, places.change], show_upload, [upload, places], found, **private)
        thresholds.select(open_thresholds, None, [threshold, errors], **private)
        threshold.input(show_threshold, threshold, errors, trigger_mode="always_last", **private)
        gr.on([maps.select, what.change], show_map, what, placed, **private)
        gr.on([hard.select, first.change], show_pairs, first, pairs, **private)
    return page


@contextlib.contextmanager
def serve(runs: Sequence[Exploration], port: int | None = None) -> Iterator[str]:
    """Serve the page of `make_page` to this machine alone, until the context ends.

    Args:
        runs: as for `make_page`.
        port: None: the first free one from 7860.

    Yields:
        The page's address.

    Raises:
        UserError: the port is not free.
    """
    with tempfile.TemporaryDirectory(prefix="mros_explorer_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when gradio is imported
        gr = import_gradio()
        from starlette.middleware import Middleware

        page = make_page(runs)
        try:
            _, address, _ = page.launch(
                server_name=HOST,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                enable_monitoring=False,
                allowed_paths=[],
                max_file_size=_LARGEST_UPLOAD,
                footer_links=[],
                theme=gr.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                head=_make_head(),
                app_kwargs={"middleware": [Middleware(_Fence)]},
            )
        except OSError as error:
            raise UserError(f"port {port} of {HOST} cannot be used: {error}") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def import_gradio() -> Any:
    """gradio, which is slow to import, told not to call home."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio

    return gradio


class _Fence:
    """Adds `_POLICY` to every answer of a web application (ASGI)."""

    def __init__(self, app: Callable[..., Any]):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_fenced(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY),
                ]
            await send(message)

        await self._app(scope, receive, send_fenced)


def _tell(show: Callable[..., str]) -> Callable[..., str]:
    """What a user can mend is told in place of the view."""

    @functools.wraps(show)
    def told(*args: Any) -> str:
        try:
            return show(*args)
        except UserError as error:
            return f'<p class="note" role="alert">{html.escape(str(error))}</p>'

    return told


def _make_head() -> str:
    """Styles and scripts. As gradio's `css` the rules for dark pages would get lost."""
    styles = "\n".join(path.read_text(encoding="utf-8") for path in _STYLES)
    return f"<style>{styles}</style><script>{_SCRIPT.read_text(encoding='utf-8')}</script>"


def _list_values(labels: np.ndarray) -> list[str]:
    return [str(value) for value in np.unique(labels)]


def _join(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

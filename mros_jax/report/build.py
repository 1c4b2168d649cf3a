"""Puts a run's numbers, charts and pictures on one page."""

import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.errors import UserError
from mros_jax.files import check_output, write_atomically
from mros_jax.inference import load_model
from mros_jax.inspection.markup import (
    describe_entry,
    describe_query,
    format_percent,
    make_environment,
    show_name,
)
from mros_jax.inspection.parts import list_edges, list_parts
from mros_jax.inspection.pictures import Pictures, encode_pixels, name_image
from mros_jax.inspection.ranking import Pairs, Ranking, Scan, choose_queries
from mros_jax.losses import make_objective
from mros_jax.report import plots
from mros_jax.report.maps import draw_maps, explain, is_drawn
from mros_jax.runs.paper import METRICS, find_paper_rows
from mros_jax.runs.results import get_scores
from mros_jax.runs.run import Run
from mros_jax.training.recipe import shape_outputs

log = logging.getLogger(__name__)

_MOST_CAMERAS = 30  # rows and columns of the table of camera pairs


def write_report(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    queries: int = 4,
    top: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> pathlib.Path:
    """Write a run's report, one HTML file that needs nothing else.

    Args:
        workdir: the run's directory, with `config.json` and `results.json`; the other files of a
            run are shown as far as they are there.
        out: file to write; default `report.html` in the run.
        queries: best, worst and random queries to show, of each.
        top: places of a ranked list to show.
        seed: draws the random queries.
        progress: show a progress bar.

    Returns:
        The file.

    Raises:
        NotFoundError: no run, or one without results.
        UserError: `queries` or `top` below 1, a damaged file of the run, or a page that cannot be
            written.
    """
    for name, value in (("queries", queries), ("top", top)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    run = Run.open(workdir)
    rankings = run.rankings
    path = pathlib.Path(out) if out is not None else run.report_file
    check_output(path)
    page: dict[str, Any] = {
        "run": run,
        "title": f"{run.system} on {run.dataset}",
        "notes": [],
        "scores": [_score(result) for result in rankings],
        "exits": [_score(entry) | _size(entry) for entry in run.results.get("exits", [])],
        "paper": _compare_with_paper(run),
        "metrics": list(METRICS),
        "curves": _plot_training(run),
        "cmc": _plot_cmc(run),
        "config": _flatten(run.config),
        "groups": [],
        "cameras": [],
        "histograms": [],
        "views": [],
        "view_notes": [],
    }
    if run.features is None:
        page["notes"].append(
            "The run holds no features.npz: ranked lists, distances and camera pairs are left out. "
            f"python -m mros_jax.evaluate --run {run} makes it."
        )
    else:
        page |= _describe_retrieval(run, run.features, page["notes"], queries, top, seed, progress)
    html = make_environment("mros_jax.report").get_template("report.html").render(page)
    with write_atomically(path) as file:
        file.write(html)
    return path


def _score(result: dict[str, Any]) -> dict[str, Any]:
    scores = get_scores(result)
    values = {name: scores.get(key) for name, key in METRICS.items()}
    return {
        "name": show_name(result["name"]),
        "values": values,
        "protocol": _flatten(result["protocol"]),
    }


def _size(entry: dict[str, Any]) -> dict[str, Any]:
    """Of one of several descriptors: its numbers, and the multiply-adds up to it in millions."""
    return {"size": entry["size"], "cost": f"{entry['multiply_adds'] / 1e6:,.1f}"}


def _compare_with_paper(run: Run) -> dict[str, Any]:
    """The published numbers beside those of the run."""
    paper, mismatches, names = find_paper_rows(run)
    rows = []
    for result, theirs in zip(run.rankings, paper, strict=True):
        score = _score(result)
        cells = [(score["values"][name], theirs.get(name)) for name in METRICS]
        rows.append({"name": score["name"], "cells": cells, "has_paper": bool(theirs)})
    return {"rows": rows, "mismatches": mismatches, "names": names}


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of every leaf."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            rows.append((f"{prefix}{key}", shown))
    return rows


def _plot_training(run: Run) -> list[dict[str, str]]:
    charts = []
    epochs = [record["step"] / run.steps_per_epoch for record in run.train_records]
    if run.train_records:
        losses = {"total": (epochs, [record["loss"] for record in run.train_records])}
        for name, term in make_objective(run.config["objective"]).terms.items():
            if f"loss/{name}" in run.train_records[0]:
                weight, shown = term.weight, name.replace("_", " ")
                values = [weight * record[f"loss/{name}"] for record in run.train_records]
                losses[shown if weight == 1 else f"{weight:g} × {shown}"] = (epochs, values)
        description = "Training loss and its parts by epoch"
        svg = plots.plot_lines("loss", description, losses, xlabel="epoch", ylabel="loss", log=True)
        charts.append({"title": "Loss", "svg": svg})
        rate = {
            key.removeprefix("lr/"): (epochs, [record[key] for record in run.train_records])
            for key in run.train_records[0]
            if key.startswith("lr/")
        }
        description = "Learning rate by epoch"
        svg = plots.plot_lines(
            "rate", description, rate, xlabel="epoch", ylabel="learning rate", log=True
        )
        charts.append({"title": "Learning rate", "svg": svg})
    if run.eval_records:
        at = [record["step"] / run.steps_per_epoch for record in run.eval_records]
        names = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
        names["mINP"] = "mINP"
        scores = {
            label: (at, [100 * record[key] for record in run.eval_records])
            for key, label in names.items()
            if key in run.eval_records[0]
        }
        svg = plots.plot_lines(
            "metrics",
            "Retrieval metrics by epoch, without re-ranking",
            scores,
            xlabel="epoch",
            ylabel="%",
            markers=True,
            bottom=0,
        )
        charts.append({"title": "Retrieval while training", "svg": svg})
    if run.timing:
        speed = {
            "images/s": (
                [record["step"] / run.steps_per_epoch for record in run.timing],
                [record["images_per_second"] for record in run.timing],
            )
        }
        svg = plots.plot_lines(
            "speed",
            "Training speed in images per second",
            speed,
            xlabel="epoch",
            ylabel="images per second",
            bottom=0,
        )
        charts.append({"title": "Training speed", "svg": svg})
    return charts


def _plot_cmc(run: Run) -> str:
    series = {}
    for result in run.rankings:
        ranks = list(range(1, len(result["cmc"]) + 1))
        name = show_name(result["name"])
        series[name] = (ranks, [100 * value for value in result["cmc"]])
    return plots.plot_lines(
        "cmc",
        "Cumulative matching characteristic with and without re-ranking",
        series,
        xlabel="rank",
        ylabel="queries with a match, %",
        top=101,
        ranks=True,
    )


def _describe_retrieval(
    run: Run,
    arrays: dict[str, np.ndarray],
    notes: list[str],
    queries: int,
    top: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Everything that is computed again from the descriptors."""
    rankings = [Ranking(arrays, result) for result in run.rankings]
    names = [show_name(ranking.name) for ranking in rankings]
    scans: list[Scan] = []
    for ranking in console.progress(rankings, desc="ranking", unit=" lists", disable=not progress):
        scans.append(ranking.scan(seed))
    if not _agree(run, scans):
        notes.append(
            "features.npz does not give the scores of results.json: one of them is from another "
            f"checkpoint. python -m mros_jax.evaluate --run {run} --out {run.results_file} makes "
            "both again."
        )
    histograms = []
    for result, name, scan in zip(run.rankings, names, scans, strict=True):
        metric = run.rankings[0]["protocol"]["metric"]
        svg = plots.plot_histograms(
            f"distances-{result['name']}",
            f"Distances of same and different identities, {name}",
            {"same identity": scan.same, "different": scan.different},
            # Nearly all pairs of different identities have a re-ranked distance of about 0.
            log=result["rerank"] == "ecn",
            xlabel=f"{metric if result['rerank'] is None else name} distance",
        )
        histograms.append({"title": f"Distances, {name}", "svg": svg})
    cameras = [
        {"name": name} | _tabulate(scan.pairs) for name, scan in zip(names, scans, strict=True)
    ]
    chosen = choose_queries(run.rankings[0], queries, seed)
    return {
        "groups": _list_queries(run, arrays, rankings, names, scans, notes, chosen, top),
        **_draw_views(run, arrays, [group[0][0] for group in chosen.values() if group], notes),
        "histograms": histograms,
        "cameras": cameras,
        "edges": list_edges(list_parts(run)),
    }


def _tabulate(pairs: Pairs) -> dict[str, Any]:
    """The table of camera pairs; with many cameras what can be said of it in a sentence."""
    rows, row = np.unique(pairs.query_camids, return_inverse=True)
    columns, column = np.unique(pairs.gallery_camids, return_inverse=True)
    if max(len(rows), len(columns)) > _MOST_CAMERAS:
        mean, low, high = (f(pairs.mAP) for f in (np.mean, np.min, np.max))
        return {
            "summary": f"{len(rows)} cameras of queries and {len(columns)} of the gallery make "
            f"{len(pairs.mAP)} pairs that share a person, too many for a table. Their mAP is "
            f"{format_percent(mean)} on average, from {format_percent(low)} to "
            f"{format_percent(high)}."
        }
    cells = np.full((len(rows), len(columns), 2), np.nan)
    cells[row, column] = np.stack([pairs.mAP, pairs.rank1], axis=1)
    counts = np.zeros((len(rows), len(columns)), int)
    counts[row, column] = pairs.queries
    return {
        "rows": list(zip(rows, cells[..., 0], cells[..., 1], strict=True)),
        "columns": columns,
        "counts": counts,
    }


def _agree(run: Run, scans: Sequence[Scan]) -> bool:
    """Whether the descriptors give the mAP that the run states, near-ties allowed for."""
    return all(
        abs(np.nanmean(scan.ap) - result["mAP"]) < 1e-3
        for scan, result in zip(scans, run.rankings, strict=True)
    )


def _list_queries(
    run: Run,
    arrays: dict[str, np.ndarray],
    rankings: Sequence[Ranking],
    names: Sequence[str],
    scans: Sequence[Scan],
    notes: list[str],
    chosen: dict[str, list[tuple[int, float, int]]],
    top: int,
) -> list[dict[str, Any]]:
    """Ranked lists of the chosen queries, grouped as best, worst and random."""
    parts = list_parts(run)
    indices = np.array([query for group in chosen.values() for query, _, _ in group])
    rows = [ranking.rows(indices) for ranking in rankings]
    lists = {
        int(query): [
            ranking.list_top(int(query), block[i], top)
            for ranking, block in zip(rankings, rows, strict=True)
        ]
        for i, query in enumerate(indices)
    }
    wanted = sorted({e.index for own in lists.values() for entries in own for e in entries})
    pictures = _load_pictures(run, arrays, indices.tolist(), wanted, notes)

    def describe(query: int) -> dict[str, Any]:
        descriptor = arrays["query_features"][query]
        shown = describe_query(arrays, query, pictures["query"].get(query))
        shown["lists"] = [
            {
                "name": name,
                "ap": float(scan.ap[query]),
                "entries": [
                    describe_entry(arrays, descriptor, entry, parts, pictures["gallery"])
                    for entry in entries
                ],
            }
            for name, scan, entries in zip(names, scans, lists[query], strict=True)
        ]
        return shown

    return [
        {"kind": kind, "queries": [describe(query) for query, _, _ in group]}
        for kind, group in chosen.items()
    ]


def _load_pictures(
    run: Run,
    arrays: dict[str, np.ndarray],
    queries: Sequence[int],
    gallery: Sequence[int],
    notes: list[str],
) -> dict[str, dict[int, str]]:
    """Data URIs of the images that the lists need; none, and a note why, if the data are gone."""
    try:
        pictures = Pictures(run, arrays)
        return {
            split: pictures.encode(split, rows)
            for split, rows in (("query", queries), ("gallery", gallery))
        }
    except (OSError, ValueError, KeyError) as error:
        notes.append(f"The data set could not be read, so there are no pictures: {error}")
        return {"query": {}, "gallery": {}}


def _draw_views(
    run: Run, arrays: dict[str, np.ndarray], queries: Sequence[int], notes: list[str]
) -> dict[str, Any]:
    """What the network looks at in some queries, if it has maps of that."""
    config = ConfigDict(run.config)
    height, width = configs.find_size(config, config.eval)
    shapes = shape_outputs(configs.make_network(config, 2), height, width).maps
    names = [name for name in shapes if is_drawn(name)]
    if not names:
        return {}
    # Of the weights that the descriptors are from, as their id says.
    checkpoint = str(arrays.get("checkpoint_id", "last")).partition("-")[0]
    try:
        model = load_model(run.path, checkpoint)
        pictures = Pictures(run, arrays).select("query", queries)
    except (OSError, ValueError, KeyError) as error:
        notes.append(f"What the network looks at cannot be shown: {error}")
        return {}
    pixels = [picture.require() for picture in pictures.map(lambda picture: picture)]
    outputs = model.outputs(pixels)
    drawings = draw_maps({name: np.asarray(outputs.maps[name]) for name in names})
    return {
        "views": [
            {
                "name": name_image(arrays, "query", query),
                "picture": encode_pixels(array),
                "drawings": own,
            }
            for query, array, own in zip(queries, pixels, drawings, strict=True)
        ],
        "view_notes": explain(names),
    }

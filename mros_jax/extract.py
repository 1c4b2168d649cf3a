"""Compute descriptors of any images, and find the images nearest to one of them.

    python -m mros_jax.extract --run RUN --images DIR --out features.npz
    python -m mros_jax.extract --run RUN --images DIR --search QUERY.jpg --top 10
    python -m mros_jax.extract --run RUN --features features.npz --search QUERY.jpg

`features.npz` holds `names` (N,), paths relative to `root`; `features` (N, D) float32, not
normalised; `root`, the directory; and what they are of: `checkpoint`, which names the weights,
`flip_test` and `crops`. Those two are the run's unless told otherwise.
"""

import argparse
import functools
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mros_jax import console, extras, parallel
from mros_jax.data.decoding import decode_images
from mros_jax.errors import UserError
from mros_jax.files import check_output, write_atomically
from mros_jax.gallery.features import (
    Features,
    add_arguments,
    check_model,
    describe,
    list_images,
    make_model_record,
)
from mros_jax.inference import Embedder, load_model
from mros_jax.retrieval import compute_distances

log = logging.getLogger(__name__)


def search(
    query: Float[np.ndarray, "D"], features: Float[np.ndarray, "N D"], top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest rows by cosine distance.

    Args:
        query: one descriptor.
        features: descriptors to search.
        top: how many, at most all.

    Returns:
        Indices (top,) nearest first, equals by index, and their distances.

    Raises:
        UserError: `top` below 1, other lengths of descriptor, zero or NaN descriptors.
    """
    if top < 1:
        raise UserError(f"top is {top}; expected at least 1")
    row = compute_distances(query[None], features)[0]
    order = np.argsort(row, kind="stable")[:top]
    return order, row[order]


def draw_search(
    query: str | os.PathLike[str],
    found: Sequence[tuple[str | os.PathLike[str], float]],
    out: str | os.PathLike[str],
) -> None:
    """Draw a query and what was found as a PNG, nearest first.

    Args:
        query: the query's image file.
        found: (image file, distance); a file that is gone leaves its place empty.
        out: file to write.
    """
    extras.require("report", "a drawing of what was found")
    from matplotlib.figure import Figure  # slow to import

    columns = min(len(found), 10) + 1
    rows = -(-len(found) // (columns - 1))
    figure = Figure(figsize=(1.15 * columns, 2.75 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    images = decode_images([pathlib.Path(query), *(pathlib.Path(path) for path, _ in found)])
    titles = ["query", *(f"{i}   {d:.3f}" for i, (_, d) in enumerate(found, 1))]
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = (0, 0) if i == 0 else divmod(i - 1, columns - 1)
        axis = axes[row, column + (i > 0)]
        axis.set_title(title, fontsize=8, fontweight="bold" if i == 0 else "normal")
        if not isinstance(image, Exception):
            axis.imshow(image)
    with write_atomically(out, "wb") as file:
        figure.savefig(file, format="png")


def _run(args: argparse.Namespace) -> None:
    if args.search is None and args.out is None:
        raise UserError("nothing to do: give --out to keep the descriptors, --search, or both")
    if args.features is not None and args.out is not None:
        raise UserError("--out writes descriptors of --images; --features are on disk already")
    for file in (args.out, args.draw if args.search is not None else None):
        if file is not None:
            parallel.run_on_main(functools.partial(check_output, file))
    listed = None
    if args.images is not None:
        listed = parallel.from_main(lambda: list_images(args.images))
    if args.search is not None:
        parallel.run_on_main(lambda: _check_image(args.search))
    log.info("Devices: %s", parallel.describe_devices())
    model = parallel.run_on_all(lambda: load_model(args.run, args.checkpoint))
    record = make_model_record(model, args.flip_test, args.crops)
    if listed is not None:
        found = describe(
            model,
            listed,
            flip_test=args.flip_test,
            crops=args.crops,
            on_bad_image=args.on_bad_image,
            progress=parallel.is_main_process(),
            together=True,
        )
    else:
        found = parallel.run_on_all(lambda: _load_features(args.features, record))
    parallel.run_on_main(lambda: _publish(args, model, found))


def _load_features(path: str, record: dict[str, Any]) -> Features:
    found = Features.load(path)
    check_model(record, found.model, path)
    return found


def _check_image(path: pathlib.Path) -> None:
    [image] = decode_images([path])
    if isinstance(image, Exception):
        raise UserError(f"--search: {path} cannot be read ({image})")


def _publish(args: argparse.Namespace, model: Embedder, found: Features) -> None:
    """Write the descriptors, and what is found with them."""
    if args.out is not None:
        found.save(args.out)
        print(f"{args.out}: {len(found)} descriptors of {found.features.shape[1]} numbers")
    if args.search is not None:
        _search(args, model, found)


def _search(args: argparse.Namespace, model: Embedder, gallery: Features) -> None:
    options = {name: gallery.model[name] for name in ("flip_test", "crops")}
    [descriptor] = model.embed([args.search], **options)
    order, distances = search(descriptor, gallery.features, args.top)
    for place, (i, distance) in enumerate(zip(order, distances, strict=True), 1):
        print(f"{place:4d}  {distance:.4f}  {gallery.names[i]}")
    root = pathlib.Path(gallery.root)
    found = [(root / gallery.names[i], float(d)) for i, d in zip(order, distances, strict=True)]
    draw_search(args.search, found, args.draw)
    print(args.draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.extract",
        description="Compute descriptors of a folder of images, or find the nearest to an image.",
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="directory of a training run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR|LIST", help="directory, or file of paths")
    source.add_argument("--features", help="descriptors that --out has written")
    parser.add_argument("--out", type=pathlib.Path, help=".npz file to write")
    parser.add_argument("--search", type=pathlib.Path, metavar="IMAGE", help="find its nearest")
    parser.add_argument("--top", type=console.count, default=10, help="how many of the nearest")
    parser.add_argument(
        "--draw", type=pathlib.Path, default="search.png", help="picture of the nearest to write"
    )
    add_arguments(parser)
    parallel.add_arguments(parser)
    args = parser.parse_args(argv)
    parallel.use_compilation_cache()
    parallel.initialize(args.coordinator_address, args.num_processes, args.process_id)
    _run(args)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

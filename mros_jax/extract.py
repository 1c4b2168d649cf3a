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
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from ml_collections import ConfigDict

from mros_jax import console, extras, parallel
from mros_jax.data import listing, text
from mros_jax.data.decoding import decode_images
from mros_jax.errors import NotFoundError, UserError
from mros_jax.files import check_output, write_atomically
from mros_jax.inference import CROPS, Embedder, choose_test, load_model
from mros_jax.retrieval import compute_distances, descriptors
from mros_jax.runs.checkpoints import NAMES
from mros_jax.runs.run import Run

log = logging.getLogger(__name__)

_BATCH = 128
_MADE_WITH = ("checkpoint", "flip_test", "crops")


def list_images(source: str | os.PathLike[str]) -> tuple[pathlib.Path, list[str]]:
    """List the names of the images that a directory or a list holds.

    Args:
        source: a directory, searched with those below it; or a text file with one path a line,
            relative to the file's own directory; empty lines and lines with # at the start are
            left out.

    Returns:
        The root, and the names relative to it; sorted for a directory, in order for a list.

    Raises:
        NotFoundError: there is no such directory or list.
        UserError: it holds no images, or is no text.
    """
    source = pathlib.Path(source)
    if source.is_dir():
        names, _ = listing.list_images(source, recursive=True)
        root = source
        expected = f"files ending in {', '.join(listing.IMAGE_SUFFIXES)}"
    elif source.is_file():
        if source.suffix.lower() in listing.IMAGE_SUFFIXES:
            raise UserError(f"{source} is an image; expected a directory or a list of paths")
        lines = (line for _, line in text.read_lines(source) if not line.startswith("#"))
        names = [line.replace("\\", "/") for line in lines]
        root = source.parent
        expected = "one path a line"
    else:
        raise NotFoundError(f"{source} is neither a directory of images nor a list of paths")
    if not names:
        raise UserError(f"{source} holds no images; expected {expected}")
    return root.resolve(), names


class _Batch(NamedTuple):
    features: np.ndarray | None
    kept: list[str]
    bad: dict[str, str]


def extract(
    embed: Callable[[list[np.ndarray]], np.ndarray],
    root: str | os.PathLike[str],
    names: Sequence[str],
    *,
    on_bad_image: Literal["error", "skip"] = "error",
    batch_size: int = _BATCH,
    progress: bool = False,
    together: bool = False,
) -> tuple[Float32[np.ndarray, "N D"], list[str], dict[str, str]]:
    """Compute descriptors of image files, a batch in memory at a time.

    Args:
        embed: images of any size to descriptors, such as `Embedder.embed`.
        root: directory of the files.
        names: files relative to it.
        on_bad_image: "error", or "skip" to leave unreadable images out.
        batch_size: images at a time.
        progress: show a progress bar.
        together: all processes of the run make the same call; each reads a share of the batches,
            and all get the whole.

    Returns:
        Descriptors (N, D), the N names they belong to, and the reason for each image left out.

    Raises:
        UserError: unreadable images (all are named), or none that can be read.
    """

    def work(starts: Sequence[int]) -> list[_Batch]:
        options = {"unit": " images", "unit_scale": batch_size, "disable": not progress}
        batches: list[_Batch] = []
        failed = False
        for start in console.progress(starts, desc="descriptors", **options):
            batch = names[start : start + batch_size]
            decoded = decode_images([pathlib.Path(root) / name for name in batch])
            pairs = list(zip(batch, decoded, strict=True))
            bad = {name: image.reason for name, image in pairs if isinstance(image, Exception)}
            kept = [name for name, image in pairs if not isinstance(image, Exception)]
            images = [image for image in decoded if not isinstance(image, Exception)]
            failed = failed or bool(bad)
            # After a bad image only the other bad ones are of interest.
            wanted = images and not (failed and on_bad_image == "error")
            batches.append(_Batch(embed(images) if wanted else None, kept, bad))
        return batches

    starts = range(0, len(names), batch_size)
    batches = parallel.share(starts, work) if together else work(starts)
    bad = {name: reason for batch in batches for name, reason in batch.bad.items()}
    kept = [name for batch in batches for name in batch.kept]
    parts = [batch.features for batch in batches if batch.features is not None]
    if bad and on_bad_image == "error":
        listed = "\n".join(f"  {name} ({reason})" for name, reason in bad.items())
        raise UserError(
            f"{len(bad)} of {len(names)} images cannot be read "
            f"(--on_bad_image=skip leaves them out):\n{listed}"
        )
    if not parts:
        raise UserError(f"none of {len(names)} images below {root} can be read")
    return np.concatenate(parts), kept, bad


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


def _load_features(
    path: str | os.PathLike[str], checkpoint_id: str, flip_test: bool, crops: str
) -> tuple[np.ndarray, list[str], pathlib.Path]:
    arrays = descriptors.load_arrays(path, ("names", "features", "root", *_MADE_WITH))
    found = (str(arrays["checkpoint"]), bool(arrays["flip_test"]), str(arrays["crops"]))
    wanted = (checkpoint_id, flip_test, crops)
    if found != wanted:
        words = (
            f"checkpoint {x} {'with' if flip else 'without'} the flip test and crops {cut!r}"
            for x, flip, cut in (found, wanted)
        )
        there, here = words
        raise UserError(
            f"{path} holds descriptors of {there}, the query's is of {here}: they cannot be "
            "compared; extract them again with --images"
        )
    return arrays["features"], arrays["names"].tolist(), pathlib.Path(str(arrays["root"]))


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
    saved = ConfigDict(Run.open(args.run).config).eval
    args.flip_test, args.crops = choose_test(saved, args.flip_test, args.crops)

    def embed(images: list[np.ndarray]) -> np.ndarray:
        # A last, shorter batch is filled up: one shape, hence one compilation.
        full = _BATCH if listed is not None and len(listed[1]) > _BATCH else len(images)
        filled = images + images[:1] * (full - len(images))
        made = model.embed(filled, batch_size=full, flip_test=args.flip_test, crops=args.crops)
        return made[: len(images)]

    if listed is not None:
        root, names = listed
        features, names, bad = extract(
            embed,
            root,
            names,
            on_bad_image=args.on_bad_image,
            progress=parallel.is_main_process(),
            together=True,
        )
        for name, reason in bad.items():
            log.warning("left out: %s (%s)", name, reason)
    else:
        features, names, root = parallel.run_on_all(
            lambda: _load_features(args.features, model.checkpoint_id, args.flip_test, args.crops)
        )
    parallel.run_on_main(lambda: _publish(args, model, features, names, root))


def _check_image(path: pathlib.Path) -> None:
    [image] = decode_images([path])
    if isinstance(image, Exception):
        raise UserError(f"--search: {path} cannot be read ({image})")


def _publish(
    args: argparse.Namespace,
    model: Embedder,
    features: np.ndarray,
    names: Sequence[str],
    root: pathlib.Path,
) -> None:
    """Write the descriptors, and what is found with them."""
    if args.out is not None:
        arrays = {
            "names": np.array(names, np.str_),
            "features": features,
            "root": np.array(str(root)),
            "checkpoint": np.array(model.checkpoint_id),
            "flip_test": np.array(args.flip_test),
            "crops": np.array(args.crops),
        }
        descriptors.save_features(args.out, arrays)
        print(f"{args.out}: {len(names)} descriptors of {features.shape[1]} numbers")
    if args.search is not None:
        _search(args, model, features, names, root)


def _search(
    args: argparse.Namespace,
    model: Embedder,
    features: np.ndarray,
    names: Sequence[str],
    root: pathlib.Path,
) -> None:
    [descriptor] = model.embed([args.search], flip_test=args.flip_test, crops=args.crops)
    order, distances = search(descriptor, features, args.top)
    for place, (i, distance) in enumerate(zip(order, distances, strict=True), 1):
        print(f"{place:4d}  {distance:.4f}  {names[i]}")
    found = [(root / names[i], float(d)) for i, d in zip(order, distances, strict=True)]
    draw_search(args.search, found, args.draw)
    print(args.draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.extract",
        description="Compute descriptors of a folder of images, or find the nearest to an image.",
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="directory of a training run")
    parser.add_argument("--checkpoint", choices=NAMES, default="last", help="of the run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR|LIST", help="directory, or file of paths")
    source.add_argument("--features", help="descriptors that --out has written")
    parser.add_argument("--out", type=pathlib.Path, help=".npz file to write")
    parser.add_argument("--search", type=pathlib.Path, metavar="IMAGE", help="find its nearest")
    parser.add_argument("--top", type=console.count, default=10, help="how many of the nearest")
    parser.add_argument(
        "--draw", type=pathlib.Path, default="search.png", help="picture of the nearest to write"
    )
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    parser.add_argument(
        "--flip_test",
        action=argparse.BooleanOptionalAction,
        help="mean of the descriptors of image and mirror image (default: as the run)",
    )
    parser.add_argument("--crops", choices=CROPS, help="mean over crops (default: as the run)")
    parallel.add_arguments(parser)
    args = parser.parse_args(argv)
    parallel.use_compilation_cache()
    parallel.initialize(args.coordinator_address, args.num_processes, args.process_id)
    _run(args)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

"""A gallery on disk that grows and is searched.

    python -m mros_jax.index build gallery.index --run RUN --images DIR
    python -m mros_jax.index add gallery.index --features features.npz
    python -m mros_jax.index remove gallery.index NAME.jpg ...
    python -m mros_jax.index search gallery.index --run RUN --images QUERY.jpg --top 10

Images are a directory, a list of paths or one file, described by a run's model; or features that
`python -m mros_jax.extract` has written. The index keeps which model made its descriptors, and
refuses those of another.
"""

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Sequence

from mros_jax import console, parallel
from mros_jax.data import text
from mros_jax.data.listing import IMAGE_SUFFIXES
from mros_jax.errors import UserError
from mros_jax.files import check_output, write_json
from mros_jax.gallery import Features, Found, Index, Listed, describe, list_images
from mros_jax.gallery.features import add_arguments, check_model, make_model_record
from mros_jax.gallery.index import check_place, choose_effort
from mros_jax.gallery.segment import KINDS
from mros_jax.inference import load_model
from mros_jax.retrieval.rerank import METHODS

log = logging.getLogger(__name__)

_SAMPLE_TOP = 10  # of the nearest that the recall of an approximate search is told of


def _list(source: str) -> Listed:
    path = pathlib.Path(source)
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        return Listed(path.parent.resolve(), [path.name])
    return list_images(path)


def _read(args: argparse.Namespace, index: Index | None = None) -> Features:
    """The descriptors that a command is given, or computes.

    That they are not those of the index is told before they are computed.
    """
    if args.features is not None:
        return Features.load(args.features)
    if args.run is None:
        raise UserError("--images need --run, the training run whose model describes them")
    listed = _list(args.images)
    parallel.use_compilation_cache()
    model = load_model(args.run, args.checkpoint)
    if index is not None:
        made = make_model_record(model, args.flip_test, args.crops)
        check_model(made, index.model, str(index.path))
    return describe(
        model,
        listed,
        flip_test=args.flip_test,
        crops=args.crops,
        on_bad_image=args.on_bad_image,
        progress=True,
    )


def _add_metadata(features: Features, path: str | None) -> Features:
    """The same with what a table has of each image."""
    if path is None:
        return features
    metadata: dict[str, dict[str, str]] = {}
    for row in text.read_table(path, ("name",)):
        if row.fields is None:
            raise UserError(f"{path}, line {row.line} has not the header's columns: {row.text}")
        fields = dict(row.fields)
        metadata[fields.pop("name")] = fields
    if absent := [name for name in features.names if name not in metadata]:
        raise UserError(
            f"{path} has no row of {len(absent)} of {len(features)} images, such as {absent[0]}"
        )
    return dataclasses.replace(features, metadata=[metadata[name] for name in features.names])


def _report(index: Index) -> None:
    print(f"{index.path}: {len(index)} images")
    if index.kind != "flat" and len(index) > _SAMPLE_TOP:
        recall = index.measure_recall(top=_SAMPLE_TOP)
        print(f"recall of the {_SAMPLE_TOP} nearest, on a sample of its images: {recall:.3f}")


def _build(args: argparse.Namespace) -> None:
    check_place(args.index)
    choose_effort(args.kind, None, args.effort)
    features = _add_metadata(_read(args), args.metadata)
    _report(Index.build(args.index, features, kind=args.kind, effort=args.effort))


def _add(args: argparse.Namespace) -> None:
    index = Index(args.index)
    index.add(_add_metadata(_read(args, index), args.metadata), replace=args.replace)
    _report(index)


def _remove(args: argparse.Namespace) -> None:
    names = list(args.names)
    if args.list is not None:
        names += [line for _, line in text.read_lines(args.list)]
    if not names:
        raise UserError("nothing to remove: give names, or --list with a file of names")
    index = Index(args.index)
    index.remove(names)
    _report(index)


def _search(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_output(args.out)
    index = Index(args.index)
    queries = _read(args, index)
    found = index.search(
        queries,
        args.top,
        effort=args.effort,
        rerank=args.rerank,
        shortlist=max(args.shortlist, args.top),
    )
    _show(queries, found)
    if args.out is not None:
        lists = [
            {
                "query": name,
                "found": [{"distance": float(d), **r} for d, r in zip(*row, strict=True)],
            }
            for name, *row in zip(queries.names, found.distances, found.records, strict=True)
        ]
        write_json(args.out, lists)


def _show(queries: Features, found: Found) -> None:
    for query, names, distances in zip(queries.names, found.names, found.distances, strict=True):
        print(query)
        for place, (name, distance) in enumerate(zip(names, distances, strict=True), 1):
            print(f"{place:4d}  {distance:.4f}  {name}")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.index",
        description="Keep a gallery on disk, add to it, remove from it and search it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, help: str, images: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("index", metavar="INDEX", help="directory of the index")
        if images:
            source = command.add_mutually_exclusive_group(required=True)
            source.add_argument("--images", metavar="DIR|LIST|FILE", help=images)
            source.add_argument(
                "--features", metavar="FILE", help="that `extract --out` has written"
            )
            command.add_argument("--run", help="training run whose model describes --images")
            add_arguments(command)
        return command

    effort = "clusters (ivf) or candidates (hnsw) that a search looks at"
    build = add_command("build", "Make an index.", "its images")
    build.add_argument("--kind", choices=list(KINDS), default="flat", help="flat is exact")
    build.add_argument("--effort", type=console.count, help=f"{effort} (default: 32, 128)")
    build.set_defaults(action=_build)

    add = add_command("add", "Add images to an index.", "images to add")
    add.add_argument("--replace", action="store_true", help="images of the same names make room")
    add.set_defaults(action=_add)

    for command in (build, add):
        command.add_argument(
            "--metadata", metavar="CSV", help="table with a column name; what else it has is kept"
        )

    remove = add_command("remove", "Remove images from an index.")
    remove.add_argument("names", metavar="NAME", nargs="*", help="as a search prints them")
    remove.add_argument("--list", metavar="FILE", help="file of names, one a line")
    remove.set_defaults(action=_remove)

    search = add_command("search", "Find the images nearest to others.", "the queries")
    search.add_argument("--top", type=console.count, default=10, help="how many of the nearest")
    search.add_argument("--effort", type=console.count, help=f"{effort} (default: as the index)")
    unlearned = [name for name, method in METHODS.items() if not method.learned]
    search.add_argument("--rerank", choices=unlearned, help="re-rank the nearest of each query")
    search.add_argument(
        "--shortlist", type=console.count, default=200, help="how many --rerank ranks, at least top"
    )
    search.add_argument("--out", type=pathlib.Path, help="also write what was found, as JSON")
    search.set_defaults(action=_search)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _make_parser().parse_args(argv)
    args.action(args)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

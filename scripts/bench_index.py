"""Measures the index: time and memory beside faiss alone, and what approximate search loses.

    python -m scripts.bench_index --quick                          # a smoke test
    python -m scripts.bench_index --part time --gallery 1000000 --kinds flat,ivf
    python -m scripts.bench_index --part quality --whole_ecn --plot docs/images/index_quality.png
    python -m scripts.bench_index --part whole --gallery 1000000

Descriptors are drawn: people and what changes between their images lie in 48 directions whose
weight falls, as in descriptors of trained networks, where few directions have most of the variance;
some noise is in all. One image in six is of somebody who is never searched for. They lie in a file
that is mapped into memory.

`time`: each row of a kind is a process of its own, ours and faiss with the same index in memory.
Both compare 3,368 queries with the gallery and give the 10 nearest; the best of some repeats
counts, and of what writes to disk the only one. CPU is the processor time of all threads, which
what else the machine does hardly changes. faiss reads and writes no names.

`quality`: by how much work a search does, the share of the 25 exact neighbours that it finds, the
time that this takes, and the mAP of what is found: the 200 nearest as they are (matches beyond
count as not found), the same re-ranked by ECN among themselves, and ECN over the whole gallery with
the lists of 25 neighbours that the search finds for every image (`--whole_ecn`).

`whole`: scores after ECN over the whole gallery from descriptors in a file, end to end: faiss's
lists of every image's neighbours by each kind but flat, re-ranking, CMC and mAP, by `evaluate` in a
process of its own; and the scores without ECN.
"""

import argparse
import json
import pathlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mros_jax import console, extras, parallel
from mros_jax.gallery import Features, Index
from mros_jax.gallery.segment import BLOCK, KINDS, describe_index
from mros_jax.retrieval import ECN, Side, evaluate
from mros_jax.retrieval.neighbors import MOST_POINTS
from scripts import common
from scripts.bench_retrieval import MARKET, QUERIES

SIZE = 512
MODEL = {"model": "drawn at random"}
EFFORTS = {"ivf": (1, 4, 16, 64), "hnsw": (25, 200, 800)}
_DIRECTIONS = 48
_ADDED = 1000
_NEAREST = 25  # that the recall is of; as many as ECN needs of each image
_SHORTLIST = 200  # as `Index.search` has it


def make_data(path: pathlib.Path, num_query: int, num_gallery: int) -> None:
    """Write `features.npy`, queries before the gallery, and `labels.npy`, (N, 2) pid and camid."""
    rng = np.random.default_rng(0)
    num, people = num_query + num_gallery, max(2, round(750 * num_gallery / MARKET))
    pids = rng.integers(1, people + 1, num)
    pids[num_query:][rng.random(num_gallery) < 1 / 6] = 0
    camids = rng.integers(1, 7, num)
    np.save(path / "labels.npy", np.stack([pids, camids], axis=1))
    weight = np.arange(1, _DIRECTIONS + 1, dtype=np.float32) ** -0.5
    directions = np.linalg.qr(rng.standard_normal((SIZE, _DIRECTIONS)))[0].T.astype(np.float32)
    centres = rng.standard_normal((people + 1, _DIRECTIONS), np.float32)
    cameras = 0.3 * rng.standard_normal((7, _DIRECTIONS), np.float32)
    header = {"descr": "<f4", "fortran_order": False, "shape": (num, SIZE)}
    with open(path / "features.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, num, BLOCK):
            part = slice(start, start + BLOCK)
            latent = centres[pids[part]]
            others = pids[part] == 0
            latent[others] = rng.standard_normal((others.sum(), _DIRECTIONS), np.float32)
            latent += cameras[camids[part]]
            latent += 0.7 * rng.standard_normal(latent.shape, np.float32)
            features = (latent * weight) @ directions
            features += 0.02 * rng.standard_normal(features.shape, np.float32)
            file.write(features.data)


def load_data(path: pathlib.Path, num_query: int) -> tuple[Side, Side]:
    """Queries and gallery."""
    features = np.asarray(np.load(path / "features.npy", mmap_mode="r"))
    labels = np.load(path / "labels.npy")
    return (
        Side(features[:num_query], labels[:num_query, 0], labels[:num_query, 1]),
        Side(features[num_query:], labels[num_query:, 0], labels[num_query:, 1]),
    )


def make_features(features: np.ndarray, first: int = 0) -> Features:
    """Images whose names are numbers."""
    return Features(features, [str(first + i) for i in range(len(features))], MODEL)


def clock(work: Callable[[], Any], repeats: int = 1) -> tuple[float, float]:
    """Seconds of the best call, and the processor time that it took, of all threads."""
    times = []
    for _ in range(repeats):
        since, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - since, time.process_time() - cpu))
    return min(times)


def time_ours(kind: str, query: np.ndarray, gallery: np.ndarray, path: pathlib.Path) -> Any:
    place = path / "gallery.index"
    images, queries = make_features(gallery), make_features(query)
    more = make_features(query[:_ADDED], len(gallery))
    found: dict[str, Any] = {"build": clock(lambda: Index.build(place, images, kind=kind))}
    found["open"] = clock(lambda: Index(place), 5)
    index = Index(place)
    lists = path / f"ours-{kind}.npy"
    found["search"] = clock(lambda: np.save(lists, index.search(queries, 10).rows), 2)
    one = make_features(query[:1])
    found["one"] = clock(lambda: index.search(one, 10), 10)
    found["bytes"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    found["add"] = clock(lambda: index.add(more))
    found["remove"] = clock(lambda: index.remove(images.names[:_ADDED]))
    return found


def time_faiss(kind: str, query: np.ndarray, gallery: np.ndarray, path: pathlib.Path) -> Any:
    extras.require("faiss", "this benchmark")
    import faiss

    form = describe_index(kind, len(gallery))
    index: Any = faiss.index_factory(SIZE, form, faiss.METRIC_INNER_PRODUCT)

    def build() -> None:
        unit = np.array(gallery)
        faiss.normalize_L2(unit)
        if kind == "ivf":
            index.cp.max_points_per_centroid = MOST_POINTS
            index.train(unit)
        index.add(unit)

    found: dict[str, Any] = {"build": clock(build)}
    if kind == "ivf":
        index.nprobe = KINDS[kind]
    if kind == "hnsw":
        index.hnsw.efSearch = KINDS[kind]
    unit = np.array(query)
    faiss.normalize_L2(unit)
    lists = path / f"faiss-{kind}.npy"
    found["search"] = clock(lambda: np.save(lists, index.search(unit, 10)[1]), 2)
    found["one"] = clock(lambda: index.search(unit[:1], 10), 10)
    return found


def time_case(name: str, path: pathlib.Path, num_query: int) -> Any:
    """Time one row of the table in this process."""
    who, kind = name.split("-")
    query, gallery = (np.asarray(side.features) for side in load_data(path, num_query))
    found = {"ours": time_ours, "faiss": time_faiss}[who](kind, query, gallery, path)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def evaluate_whole(neighbors: str | None, path: pathlib.Path, num_query: int) -> dict[str, float]:
    """Scores after ECN with these neighbours, or without ECN, in this process."""
    query, gallery = load_data(path, num_query)
    rerank = None if neighbors is None else ECN(neighbors=neighbors)
    scores = []
    seconds, cpu = clock(lambda: scores.append(evaluate(query, gallery, rerank=rerank)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (found,) = scores
    rank1 = float(found.cmc[0])
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "mAP": found.mAP, "rank1": rank1}


def measure_whole(args: argparse.Namespace, path: pathlib.Path) -> str:
    """The table of `whole`: a process for each row."""
    cases: dict[str, str | None] = {"CMC, mAP, mINP": None}
    for kind, effort in {"ivf": "nprobe", "hnsw": "efSearch"}.items():
        if kind in args.kinds:
            form = describe_index(kind, args.gallery + args.queries)
            lists = f"faiss:{form}:{effort}={KINDS[kind]}"
            cases[f"with ECN, {lists}"] = lists
    rows = []
    for name, neighbors in cases.items():
        got = run_child("whole", neighbors, args, path)
        cells = (f"{got[x]:.1f}" for x in ("seconds", "cpu"))
        scores = (f"{100 * got[x]:.2f}" for x in ("mAP", "rank1"))
        rows.append([name, *cells, f"{got['peak']:.2f}", *scores])
    header = ("what", "seconds", "CPU s", "peak GB", "mAP", "Rank-1")
    return common.format_table(header, rows)


def run_child(part: str, what: str | None, args: argparse.Namespace, path: pathlib.Path) -> Any:
    """Measure one row in a process of its own, which `main` is called in."""
    request = json.dumps([part, what])
    words = [f"--child={request}", f"--directory={path}", f"--queries={args.queries}"]
    return common.run_child("scripts.bench_index", words, f"{part}, {what}")


def compare_lists(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours that was found."""
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / exact.size


def time_kinds(args: argparse.Namespace, path: pathlib.Path) -> str:
    rows = []
    for kind in args.kinds:
        for who in ("ours", "faiss"):
            got = run_child("time", f"{who}-{kind}", args, path)
            lists = [np.load(path / f"{name}.npy") for name in (f"{who}-{kind}", "ours-flat")]
            cells = [
                *(f"{got[name][0]:.1f} ({got[name][1]:.1f})" for name in ("build", "search")),
                f"{1000 * got['one'][0]:.1f}",
                f"{compare_lists(*lists):.3f}",
                f"{got['peak']:.2f}",
                *(f"{got[x][0]:.2f}" if x in got else "" for x in ("open", "add", "remove")),
                f"{got['bytes'] / 1e9:.2f}" if "bytes" in got else "",
            ]
            rows.append([kind, who, *cells])
            shutil.rmtree(path / "gallery.index", ignore_errors=True)
    header = ("kind", "by", "build, s (CPU)", "search, s (CPU)", "one query, ms", "recall")
    more = ("peak GB", "open, s", f"add {_ADDED:,}, s", f"remove {_ADDED:,}, s", "disk GB")
    return common.format_table(header + more, rows)


def average_precision(rows: np.ndarray, query: Side, gallery: Side) -> float:
    """Mean average precision by the protocol of Market-1501; what is not in a list is not found."""
    pids, camids = np.asarray(gallery.pids), np.asarray(gallery.camids)
    order = np.argsort(pids, kind="stable")
    bounds = (
        np.searchsorted(pids[order], np.asarray(query.pids), "left"),
        np.searchsorted(pids[order], np.asarray(query.pids), "right"),
    )
    values = []
    for i, (pid, camid) in enumerate(zip(query.pids, query.camids, strict=True)):
        mates = order[bounds[0][i] : bounds[1][i]]
        matches = int((camids[mates] != camid).sum())
        if matches:
            kept = rows[i][(pids[rows[i]] != pid) | (camids[rows[i]] != camid)]
            places = np.flatnonzero(pids[kept] == pid)
            values.append(float((np.arange(1, len(places) + 1) / (places + 1)).sum() / matches))
    return float(np.mean(values))


def measure_quality(args: argparse.Namespace, path: pathlib.Path) -> list[dict[str, Any]]:
    """Recall and mAP of each kind by effort; the exact search first."""
    query, gallery = load_data(path, args.queries)
    queries = make_features(np.asarray(query.features))
    everything = np.asarray(np.load(path / "features.npy", mmap_mode="r"))
    measured: list[dict[str, Any]] = []
    exact = None
    for kind, efforts in {"flat": (None,), **EFFORTS}.items():
        if kind not in args.kinds:
            continue
        place = path / "quality.index"
        index = Index.build(place, make_features(np.asarray(gallery.features)), kind=kind)
        if args.whole_ecn:
            whole = Index.build(path / "whole.index", make_features(everything), kind=kind)
        for effort in efforts:
            since = time.perf_counter()
            near = index.search(queries, _NEAREST, effort=effort).rows
            seconds = time.perf_counter() - since
            exact = near if exact is None else exact
            found = index.search(queries, _SHORTLIST, effort=effort).rows
            row = {
                "kind": kind,
                "effort": effort,
                "recall": compare_lists(near, exact),
                "ms": 1000 * seconds / len(near),
                "plain": average_precision(found, query, gallery),
            }
            ranked = index.search(queries, _SHORTLIST, effort=effort, rerank=ECN())
            row["ecn"] = average_precision(ranked.rows, query, gallery)
            if args.whole_ecn:
                lists = np.concatenate(
                    [
                        whole.search(
                            make_features(everything[i : i + BLOCK]), _NEAREST, effort=effort
                        ).rows
                        for i in range(0, len(everything), BLOCK)
                    ]
                )
                row["whole"] = evaluate(query, gallery, rerank=ECN(neighbors=lists)).mAP
            measured.append(row)
            print(row, file=sys.stderr)
        shutil.rmtree(place)
        shutil.rmtree(path / "whole.index", ignore_errors=True)
    return measured


_CURVES = {
    "plain": "the 200 nearest",
    "ecn": "re-ranked by ECN among themselves",
    "whole": "ECN over the gallery",
}


def format_quality(measured: Sequence[dict[str, Any]]) -> str:
    curves = [name for name in _CURVES if name in measured[0]]
    rows = [
        [
            row["kind"],
            row["effort"] or "",
            f"{row['recall']:.3f}",
            f"{row['ms']:.2f}",
            *(f"{100 * row[name]:.2f}" for name in curves),
        ]
        for row in measured
    ]
    header = (
        "kind",
        "effort",
        "recall of 25",
        "ms a query",
        *(f"mAP, {_CURVES[x]}" for x in curves),
    )
    return common.format_table(header, rows)


def plot_quality(measured: Sequence[dict[str, Any]], title: str, out: pathlib.Path) -> None:
    """Draw mAP by recall, with the exact search's as a line."""
    extras.require("report", "a plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, color in zip(_CURVES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        if name not in measured[0]:
            continue
        axis.axhline(100 * measured[0][name], color=color, linestyle=":", linewidth=1)
        for kind, marker in (("ivf", "o"), ("hnsw", "s")):
            rows = [row for row in measured if row["kind"] == kind]
            if not rows:
                continue
            axis.plot(
                [row["recall"] for row in rows],
                [100 * row[name] for row in rows],
                marker=marker,
                color=color,
                linestyle="-" if kind == "ivf" else "--",
                label=f"{kind}: {_CURVES[name]}",
            )
    axis.set(xlabel="recall of the 25 nearest", ylabel="mAP, %", title=f"{title}; dotted: exact")
    axis.grid(visible=True, alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    common.add_part(parser, ("time", "quality", "whole"))
    parser.add_argument("--gallery", type=console.count, default=100_000, help="images")
    parser.add_argument("--queries", type=console.count, default=QUERIES, help="queries")
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas; flat is needed")
    parser.add_argument("--whole_ecn", action="store_true", help="also ECN over the whole gallery")
    parser.add_argument("--quick", action="store_true", help="12,000 images: a smoke test")
    parser.add_argument("--directory", type=pathlib.Path, help="where to work, empty (temporary)")
    parser.add_argument("--plot", type=pathlib.Path, help="picture of the quality to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    common.add_markdown(parser)
    args = parser.parse_args(argv)
    if args.child:
        part, what = json.loads(args.child)
        work = {"time": time_case, "whole": evaluate_whole}[part]
        print(json.dumps(work(what, args.directory, args.queries)))
        return 0
    args.kinds = args.kinds.split(",")
    if unknown := set(args.kinds) - set(KINDS) or {"flat"} - set(args.kinds):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if args.quick:
        args.gallery, args.queries = 12_000, 100
    parallel.use_compilation_cache()
    what = f"{args.queries:,} queries, {args.gallery:,} images, {SIZE} numbers"
    texts = [
        f"Measured by `scripts/bench_index.py` on {common.describe_machine('faiss-cpu')}. {what}."
    ]
    with tempfile.TemporaryDirectory(dir=args.directory) as work:
        path = pathlib.Path(work)
        make_data(path, args.queries, args.gallery)
        if "time" in args.part:
            texts.append(time_kinds(args, path))
        if "quality" in args.part:
            measured = measure_quality(args, path)
            texts.append(format_quality(measured))
            if args.plot:
                plot_quality(measured, what, args.plot)
        if "whole" in args.part:
            texts.append(measure_whole(args, path))
    common.publish("\n\n".join(texts), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

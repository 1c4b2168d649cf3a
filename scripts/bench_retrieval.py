"""Times evaluation and re-ranking against other ways of computing the same.

    python -m scripts.bench_retrieval --quick                     # a smoke test, seconds
    python -m scripts.bench_retrieval                             # about five minutes
    python -m scripts.bench_retrieval --growth --plot docs/images/retrieval_growth.png
    python -m scripts.bench_retrieval --slow --peer_python PEERS/bin/python

Descriptors are random with Market-1501's shape: 3,368 queries of 750 people, six cameras. Every
case runs in a process of its own, which reports the time of the best of its repeats (without
compiling; the first call is given beside it) and its peak memory (of the whole process, libraries
and input included).

Peers are public packages where an interpreter with them is named by --peer_python (pip install
faiss-cpu; pip install --no-deps torchreid), and otherwise formulas written here: those have the
algorithm and the N x N arrays of public codes, not their text. --slow adds the peers that take a
minute or ten gigabytes.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ARRAYS = tuple(
    f"{split}_{name}" for name in ("features", "pids", "camids") for split in ("query", "gallery")
)
MARKET, MARKET_ALL = 15913, 19732  # gallery without and with junk
QUERIES = 3368


def make_data(num_query: int, num_gallery: int, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Descriptors around a centre for each person; one in six of the gallery is a distractor."""
    rng = np.random.default_rng(seed)
    people = max(2, round(750 * num_gallery / MARKET))
    centres = rng.standard_normal((people + 1, size), np.float32)
    data: dict[str, np.ndarray] = {}
    for name, num in (("query", num_query), ("gallery", num_gallery)):
        pids = rng.integers(1, people + 1, num)
        if name == "gallery":
            pids[rng.random(num) < 1 / 6] = 0
        features = rng.standard_normal((num, size), np.float32)
        features *= 2.2
        for start in range(0, num, 65536):  # no second array of this size
            part = slice(start, start + 65536)
            features[part] += centres[pids[part]] * (pids[part] > 0)[:, None]
        data[f"{name}_features"] = features
        data[f"{name}_pids"] = pids
        data[f"{name}_camids"] = rng.integers(1, 7, num)
    return data


def normalize(features: np.ndarray) -> np.ndarray:
    unit: np.ndarray = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def add_distance(data: dict[str, np.ndarray]) -> None:
    data["distance"] = 1 - normalize(data["query_features"]) @ normalize(data["gallery_features"]).T


# Ours.


def ours_distances(data: dict[str, np.ndarray]) -> float:
    from mros_jax.retrieval import evaluate_distances

    return evaluate_distances(data["distance"], *(data[name] for name in ARRAYS[2:])).mAP


def ours_features(data: dict[str, np.ndarray]) -> float:
    from mros_jax.retrieval import evaluate

    return evaluate(*(data[name] for name in ARRAYS)).mAP


def ours_reranked(method: str, dtype: Any = np.float32) -> Callable[[dict[str, np.ndarray]], float]:
    """Distances of all pairs, as a matrix."""

    def run(data: dict[str, np.ndarray]) -> float:
        from mros_jax.retrieval import rerank

        distance = rerank.METHODS[method]().distances(
            data["query_features"], data["gallery_features"], dtype=dtype
        )
        return float(distance[::7, ::7].mean())

    return run


def ours_rerank_scores(method: str) -> Callable[[dict[str, np.ndarray]], float]:
    """Scores after re-ranking, block by block."""

    def run(data: dict[str, np.ndarray]) -> float:
        from mros_jax.retrieval import evaluate

        return evaluate(*(data[name] for name in ARRAYS), rerank=method).mAP

    return run


def ours_jitted(data: dict[str, np.ndarray]) -> float:
    """Scores after ECN in one compiled program, by dense gathers: what is for accelerators."""
    from mros_jax.retrieval import ECN, jitted

    most = int(np.bincount(data["gallery_pids"])[1:].max())
    arrays = (data[name] for name in ARRAYS)
    return float(jitted.evaluate(*arrays, most_per_pid=most, rerank=ECN()).mAP)


def ours_neighbors(data: dict[str, np.ndarray]) -> float:
    from mros_jax.retrieval.neighbors import search_neighbors, stack

    features = stack(data["query_features"], data["gallery_features"])
    return float(search_neighbors(features, 25).indices.mean())


# Peers: formulas.


def product(data: dict[str, np.ndarray]) -> float:
    return float((data["query_features"] @ data["gallery_features"].T)[0, 0])


def sorted_scores(distance: np.ndarray, data: dict[str, np.ndarray]) -> float:
    """CMC, AP and mINP from an argsort of the whole matrix, as the compiled evaluators do it."""
    order = np.argsort(distance, axis=1)
    precisions, first, inp = [], [], []
    for i, row in enumerate(order):
        pids, camids = data["gallery_pids"][row], data["gallery_camids"][row]
        same = pids == data["query_pids"][i]
        kept = (pids != -1) & ~(same & (camids == data["query_camids"][i]))
        ranks = np.flatnonzero(same[kept]) + 1
        if len(ranks):
            precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
            first.append(ranks[0])
            inp.append(len(ranks) / ranks[-1])
    np.cumsum(np.bincount(first, minlength=51)[1:51])
    return float(np.mean(precisions))


def sorted_distances(data: dict[str, np.ndarray]) -> float:
    return sorted_scores(data["distance"], data)


def sorted_features(data: dict[str, np.ndarray]) -> float:
    query, gallery = normalize(data["query_features"]), normalize(data["gallery_features"])
    return sorted_scores(1 - query @ gallery.T, data)


def dense_ecn(data: dict[str, np.ndarray], k: int = 25, t: int = 3, q: int = 8) -> float:
    """ECN with N x N matrices, the means gathered one neighbour at a time to fit in memory."""
    features = normalize(np.concatenate([data["query_features"], data["gallery_features"]]))
    num, num_query = len(features), len(data["query_features"])
    cosine = 1 - features @ features.T
    order = np.argsort(cosine, axis=1).astype(np.int32)
    weights = np.zeros((num, num), np.float32)
    np.put_along_axis(weights, order[:, :k], np.arange(k, 0, -1, dtype=np.float32)[None], axis=1)
    distance = -(weights @ weights.T)
    del weights
    first = order[:, 1 : t + 1]
    near = np.concatenate([first, order[first, 1 : q + 1].reshape(num, -1)], axis=1)
    del order
    total = np.zeros((num_query, num - num_query), np.float32)
    for i in range(near.shape[1]):
        total += distance[near[:num_query, i], num_query:]
        total += distance[:num_query, near[num_query:, i]]
    total /= 2 * near.shape[1]
    total = np.where(total == 0, cosine[:num_query, num_query:], total)
    return float(total[::7, ::7].mean())


def dense_k_reciprocal(
    data: dict[str, np.ndarray], k1: int = 20, k2: int = 6, weight: float = 0.3
) -> float:
    """k-reciprocal encoding with N x N matrices."""
    features = normalize(np.concatenate([data["query_features"], data["gallery_features"]]))
    num, num_query = len(features), len(data["query_features"])
    distance = np.maximum(2 - 2 * (features @ features.T), 0)
    distance /= distance.max(axis=1, keepdims=True)
    order = np.argsort(distance, axis=1)[:, : k1 + 1].astype(np.int32)
    half = int(np.around(k1 / 2)) + 1

    def reciprocal(i: int, length: int) -> np.ndarray:
        forward = order[i, :length]
        mutual: np.ndarray = forward[(order[forward, :length] == i).any(1)]
        return mutual

    encoded = np.zeros((num, num), np.float32)
    for i in range(num):
        members = reciprocal(i, k1 + 1)
        expanded = [members]
        for candidate in members:
            theirs = reciprocal(candidate, half)
            if len(np.intersect1d(theirs, members)) > 2 / 3 * len(theirs):
                expanded.append(theirs)
        columns = np.unique(np.concatenate(expanded))
        values = np.exp(-distance[i, columns])
        encoded[i, columns] = values / values.sum()
    encoded = np.stack([encoded[row[:k2]].mean(0) for row in order])
    holders = [np.flatnonzero(encoded[:, i]) for i in range(num)]
    result = weight * distance[:num_query, num_query:]
    for i in range(num_query):
        shared = np.zeros(num, np.float32)
        for column in np.flatnonzero(encoded[i]):
            rows = holders[column]
            shared[rows] += np.minimum(encoded[i, column], encoded[rows, column])
        result[i] += (1 - weight) * (1 - shared / (2 - shared))[num_query:]
    return float(result[::7, ::7].mean())


# Peers: packages.


def load_module(name: str) -> Any:
    """A file of an installed package, without importing the package and what it needs."""
    import importlib.metadata
    import importlib.util

    distribution, _, path = name.partition(":")
    file = importlib.metadata.distribution(distribution).locate_file(path)
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, str(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchreid_scores(data: dict[str, np.ndarray]) -> float:
    rank = load_module("torchreid:torchreid/reid/metrics/rank.py")
    labels = [data[name] for name in ARRAYS[2:]]
    return float(rank.eval_market1501(data["distance"], *labels, 50)[1])


def torchreid_k_reciprocal(data: dict[str, np.ndarray]) -> float:
    rerank = load_module("torchreid:torchreid/reid/utils/rerank.py")
    query, gallery = normalize(data["query_features"]), normalize(data["gallery_features"])

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distances: np.ndarray = np.sqrt(np.maximum(2 - 2 * (a @ b.T), 0))
        return distances

    result = rerank.re_ranking(
        distance(query, gallery), distance(query, query), distance(gallery, gallery)
    )
    return float(result[::7, ::7].mean())


def faiss_neighbors(data: dict[str, np.ndarray]) -> float:
    import faiss

    features = normalize(np.concatenate([data["query_features"], data["gallery_features"]]))
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features)
    return float(index.search(features, 25)[1].mean())


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what, who, on data of which size."""

    title: str
    who: str
    run: Callable[[dict[str, np.ndarray]], float]
    gallery: int
    size: int
    repeats: int = 3
    slow: bool = False  # a minute, or ten gigabytes
    package: bool = False  # needs --peer_python
    distance: bool = False  # starts from a matrix of distances


SCORES = "CMC, mAP, mINP from a distance matrix"
CASES = {
    "product-512": Case("float32 product alone", "NumPy", product, MARKET, 512, 5),
    "scores": Case(SCORES, "ours", ours_distances, MARKET, 512, 5, distance=True),
    "scores-sort": Case(
        SCORES, "argsort (formula)", sorted_distances, MARKET, 512, 1, distance=True
    ),
    "scores-torchreid": Case(
        SCORES, "torchreid", torchreid_scores, MARKET, 512, 1, True, True, distance=True
    ),
    "features-512": Case("the same from descriptors", "ours", ours_features, MARKET, 512, 3),
    "features-512-sort": Case(
        "the same from descriptors", "argsort (formula)", sorted_features, MARKET, 512, 1
    ),
    "product-2048": Case("float32 product alone", "NumPy", product, MARKET, 2048),
    "features-2048": Case("the same from descriptors", "ours", ours_features, MARKET, 2048),
    "product-15360": Case("float32 product alone", "NumPy", product, MARKET, 15360, 2),
    "features-15360": Case("the same from descriptors", "ours", ours_features, MARKET, 15360, 2),
    "features-96k": Case("the same from descriptors", "ours", ours_features, 96000, 512, 2),
    "features-96k-sort": Case(
        "the same from descriptors", "argsort (formula)", sorted_features, 96000, 512, 1, slow=True
    ),
    "neighbors": Case("25 neighbours of every image", "ours", ours_neighbors, MARKET_ALL, 512, 2),
    "neighbors-faiss": Case(
        "25 neighbours of every image", "faiss", faiss_neighbors, MARKET_ALL, 512, 2, package=True
    ),
    "ecn": Case(
        "ECN distances", "ours, float64", ours_reranked("ecn", np.float64), MARKET_ALL, 512, 2
    ),
    "ecn-32": Case("ECN distances", "ours, float32", ours_reranked("ecn"), MARKET_ALL, 512, 2),
    "ecn-scores": Case("scores after ECN", "ours", ours_rerank_scores("ecn"), MARKET_ALL, 512, 2),
    "ecn-jitted": Case("scores after ECN", "ours, one program", ours_jitted, MARKET_ALL, 512, 2),
    "ecn-dense": Case("ECN distances", "dense (formula)", dense_ecn, MARKET_ALL, 512, 1, slow=True),
    "k_reciprocal": Case(
        "k-reciprocal distances", "ours", ours_reranked("k_reciprocal"), MARKET, 512, 2
    ),
    "k_reciprocal-scores": Case(
        "scores after k-reciprocal", "ours", ours_rerank_scores("k_reciprocal"), MARKET, 512, 2
    ),
    "k_reciprocal-dense": Case(
        "k-reciprocal distances", "dense (formula)", dense_k_reciprocal, MARKET, 512, 1, slow=True
    ),
    "k_reciprocal-torchreid": Case(
        "k-reciprocal distances", "torchreid", torchreid_k_reciprocal, MARKET, 512, 1, True, True
    ),
}
GROWTH = {
    f"growth-{kind}-{gallery}": Case(title, "ours", run, gallery, 512, 1)
    for kind, title, run, galleries in (
        ("scores", "plain", ours_features, (20000, 50000, 100000, 200000, 1000000)),
        ("ecn", "with ECN", ours_rerank_scores("ecn"), (20000, 50000)),
    )
    for gallery in galleries
}


def measure(case: Case, quick: bool) -> dict[str, Any]:
    """Run a case in this process."""
    scale = 0.02 if quick else 1.0
    data = make_data(int(QUERIES * scale), int(case.gallery * scale), case.size)
    if case.distance:
        add_distance(data)
    times = []
    # The first call compiles; what takes a minute is timed at once.
    warm = case.who.startswith("ours") and case.gallery < 1000000
    for _ in range(case.repeats + warm):
        start = time.perf_counter()
        check = case.run(data)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": min(times),
        "first": times[0],
        "peak_gb": peak,
        "check": check,
        "gallery": len(data["gallery_pids"]),
    }


def spawn(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any] | None:
    """Run a case in a process of its own."""
    python = args.peer_python if case.package else sys.executable
    command = [python, __file__, "--child", name, *(["--quick"] if args.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        print(f"{name} failed: {' '.join(last)}", file=sys.stderr)
        return None
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def format_table(results: dict[str, dict[str, Any]], cases: dict[str, Case]) -> str:
    from scripts import common  # which the interpreter of the peers does not have

    lines = [
        f"Measured by `scripts/bench_retrieval.py` on {common.describe_machine()}. "
        f"{QUERIES:,} queries; seconds without compiling (in brackets: the first call), "
        "peak memory of the process.",
        "",
        "| what | gallery | numbers | by | seconds | peak GB | check |",
        "| --- | --: | --: | --- | --: | --: | --: |",
    ]
    for name, got in results.items():
        case = cases[name]
        first = f" ({got['first']:.1f})" if got["first"] > 1.2 * got["seconds"] else ""
        lines.append(
            f"| {case.title} | {case.gallery:,} | {case.size:,} | {case.who} | "
            f"{got['seconds']:.2f}{first} | {got['peak_gb']:.2f} | {got['check']:.6g} |"
        )
    return "\n".join(lines)


def plot_growth(results: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for kind, marker in (("plain", "o"), ("with ECN", "s")):
        got = [(GROWTH[n].gallery, r) for n, r in results.items() if GROWTH[n].title == kind]
        for axis, field in zip(axes, ("seconds", "peak_gb"), strict=True):
            axis.plot([g for g, _ in got], [r[field] for _, r in got], marker=marker, label=kind)
    for axis, label in zip(axes, ("seconds", "peak memory, GB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="gallery images", ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.legend()
    figure.suptitle(f"{QUERIES:,} queries, 512 numbers, {os.cpu_count()} cores")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1/50 of the size: a smoke test")
    parser.add_argument("--slow", action="store_true", help="also peers of a minute or 10 GB")
    parser.add_argument("--peer_python", help="an interpreter with faiss and torchreid")
    parser.add_argument("--growth", action="store_true", help="only galleries of 20k to 1M")
    parser.add_argument("--only", help="names of cases, with commas")
    parser.add_argument("--plot", type=pathlib.Path, help="where --growth draws its picture")
    parser.add_argument("--markdown", type=pathlib.Path, help="also write the table to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cases = CASES | GROWTH
    if args.child:
        print(json.dumps(measure(cases[args.child], args.quick)))
        return 0
    if args.only:
        unknown = set(args.only.split(",")) - set(cases)
        if unknown:
            parser.error(f"no case {', '.join(unknown)}; there are {', '.join(cases)}")
        chosen = {name: cases[name] for name in args.only.split(",")}
    else:
        chosen = GROWTH if args.growth else CASES
        chosen = {n: c for n, c in chosen.items() if args.slow or args.quick or not c.slow}
    results = {}
    for name, case in chosen.items():
        if case.package and not args.peer_python:
            continue
        got = spawn(name, case, args)
        if got is not None:
            results[name] = got
            print(f"{name}: {got['seconds']:.2f} s, {got['peak_gb']:.2f} GB", file=sys.stderr)
    from scripts import common  # which the interpreter of the peers does not have

    common.publish(format_table(results, cases), args.markdown)
    if args.plot:
        plot_growth({n: r for n, r in results.items() if n in GROWTH}, args.plot)
    return 0


if __name__ == "__main__":
    if "--child" in sys.argv:  # perhaps by the interpreter of the peers, without this library
        sys.exit(main())
    from mros_jax import console

    sys.exit(console.run(main))

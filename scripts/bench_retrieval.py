"""Times evaluation and re-ranking against other ways of computing the same.

    python -m scripts.bench_retrieval --quick                     # a smoke test, seconds
    python -m scripts.bench_retrieval                             # about five minutes
    python -m scripts.bench_retrieval --mapped                    # large ones from files; an hour
    python -m scripts.bench_retrieval --slow --peer_python PEERS/bin/python --fastreid FAST-REID

Descriptors are random with Market-1501's shape: 3,368 queries of 750 people, six cameras; or they
have the labels of a file (--labels, an .npz file with query_pids, gallery_pids, query_camids and
gallery_camids, junk with pid -1 included). Every case runs in a process of its own, which reports
the time of the best of its repeats (without compiling; the first call is given beside it) and its
peak memory (of the whole process, libraries and input included). Cases that compute the same take
turns, and the ratio to the first of them is the median of the rounds': what else the machine does
slows all of them alike.

Peers are public packages where an interpreter with them is named by --peer_python (pip install
faiss-cpu; pip install --no-deps torchreid), fast-reid where --fastreid names a clone of
https://github.com/JDAI-CV/fast-reid in which its evaluator is compiled (make -C
fastreid/evaluation/rank_cylib), and otherwise formulas written here: those have the algorithm and
the N x N arrays of public codes, not their text. --slow adds the peers that take a minute or ten
gigabytes. --before names a clone of this project at another commit (git worktree add BEFORE
COMMIT): its package takes turns with ours.
"""

import argparse
import atexit
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ARRAYS = tuple(
    f"{split}_{name}" for name in ("features", "pids", "camids") for split in ("query", "gallery")
)
MARKET, MARKET_ALL = 15913, 19732  # gallery without and with junk
QUERIES = 3368


def make_labels(num_query: int, num_gallery: int, rng: np.random.Generator) -> dict[str, Any]:
    """Random labels; one in six of the gallery is a distractor."""
    people = max(2, round(750 * num_gallery / MARKET))
    labels: dict[str, Any] = {}
    for name, num in (("query", num_query), ("gallery", num_gallery)):
        labels[f"{name}_pids"] = rng.integers(1, people + 1, num)
        labels[f"{name}_camids"] = rng.integers(1, 7, num)
    labels["gallery_pids"][rng.random(num_gallery) < 1 / 6] = 0
    return labels


def load_labels(path: str, num_gallery: int) -> dict[str, Any]:
    """Labels of a file, without junk where only so the gallery has this size."""
    with np.load(path) as file:
        labels = {name: file[name].astype(np.int64) for name in ARRAYS[2:]}
    if len(labels["gallery_pids"]) != num_gallery:
        kept = labels["gallery_pids"] != -1
        labels |= {name: labels[name][kept] for name in ("gallery_pids", "gallery_camids")}
    return labels


def make_aligned(num: int, size: int) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes.

    So does what the package's own extraction makes; JAX copies what begins elsewhere.
    """
    raw = np.empty(num * size + 16, np.float32)
    begin = -raw.ctypes.data % 64 // 4
    return raw[begin : begin + num * size].reshape(num, size)


def fill_features(
    features: np.ndarray, pids: np.ndarray, centres: np.ndarray, rng: np.random.Generator
) -> None:
    """Descriptors around a centre for each person."""
    step = max(1, 2**22 // features.shape[1])  # no second array of this size
    for start in range(0, len(pids), step):
        some, part = features[start : start + step], pids[start : start + step]
        rng.standard_normal(dtype=np.float32, out=some)
        some *= 2.2
        some += centres[np.maximum(part, 0)] * (part > 0)[:, None]


def make_data(
    num_query: int,
    num_gallery: int,
    size: int,
    seed: int = 0,
    labels: str | None = None,
    directory: str | None = None,
) -> dict[str, np.ndarray]:
    """The six arrays of an evaluation; with a directory they are also files there."""
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = (
        load_labels(labels, num_gallery) if labels else make_labels(num_query, num_gallery, rng)
    )
    most = max(data["query_pids"].max(), data["gallery_pids"].max())
    centres = rng.standard_normal((most + 1, size), np.float32)
    for name in ("query", "gallery"):
        pids = data[f"{name}_pids"]
        file = f"{directory}/{name}_features.npy"
        features = (
            make_aligned(len(pids), size)
            if directory is None
            else np.lib.format.open_memmap(file, "w+", np.float32, (len(pids), size))
        )
        fill_features(features, pids, centres, rng)
        data[f"{name}_features"] = features
    if directory is not None:
        for name in ARRAYS[2:]:
            np.save(f"{directory}/{name}.npy", data[name])
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

        return evaluate(*(data[name] for name in ARRAYS), rerank=method, keep_junk=True).mAP

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


def fastreid_scores(data: dict[str, np.ndarray]) -> float:
    rank = importlib.import_module("rank_cy")
    labels = [data[name] for name in ARRAYS[2:]]
    return float(rank.evaluate_cy(data["distance"], *labels, 50)[1].mean())


def fastreid_features(data: dict[str, np.ndarray]) -> float:
    add_distance(data)
    return fastreid_scores(data)


def fastreid_k_reciprocal(data: dict[str, np.ndarray]) -> float:
    """Its Jaccard distances of all pairs, with lists by faiss on the CPU."""
    import torch

    compute = importlib.import_module("utils.compute_dist").compute_jaccard_distance
    features = normalize(np.concatenate([data["query_features"], data["gallery_features"]]))
    distance = compute(torch.from_numpy(features), search_option=3)
    num_query = len(data["query_features"])
    return float(distance[:num_query:7, num_query::7].mean())


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
    needs: str = ""  # "peer_python" or "fastreid": an argument
    distance: bool = False  # starts from a matrix of distances
    package: str = ""  # a clone whose package is measured in place of this one
    queries: int = QUERIES
    mapped: bool = False  # starts from files that are mapped into memory

    def group(self) -> tuple[Any, ...]:
        """The same for cases that take turns."""
        return self.title, self.gallery, self.size


PEER, FASTREID = "peer_python", "fastreid"
BEFORE = "-before"  # after the name of a case: of another package
SCORES, FEATURES = "CMC, mAP, mINP from a distance matrix", "the same from descriptors"
PRODUCT = "the float32 product alone, NumPy"
CASES = {
    "scores": Case(SCORES, "ours", ours_distances, MARKET, 512, 5, distance=True),
    "scores-sort": Case(
        SCORES, "argsort (formula)", sorted_distances, MARKET, 512, 1, distance=True
    ),
    "scores-torchreid": Case(
        SCORES, "torchreid", torchreid_scores, MARKET, 512, 1, True, PEER, distance=True
    ),
    "scores-fastreid": Case(
        SCORES,
        "fast-reid, compiled",
        fastreid_scores,
        MARKET,
        512,
        3,
        needs=FASTREID,
        distance=True,
    ),
    "features-512": Case(FEATURES, "ours", ours_features, MARKET, 512, 5),
    "product-512": Case(FEATURES, PRODUCT, product, MARKET, 512, 5),
    "features-512-fastreid": Case(
        FEATURES, "fast-reid, compiled", fastreid_features, MARKET, 512, 3, needs=FASTREID
    ),
    "features-512-sort": Case(FEATURES, "argsort (formula)", sorted_features, MARKET, 512, 1),
    "features-2048": Case(FEATURES, "ours", ours_features, MARKET, 2048),
    "product-2048": Case(FEATURES, PRODUCT, product, MARKET, 2048),
    "features-15360": Case(FEATURES, "ours", ours_features, MARKET, 15360, 3),
    "product-15360": Case(FEATURES, PRODUCT, product, MARKET, 15360, 3),
    "features-96k": Case(FEATURES, "ours", ours_features, 96000, 512, 2),
    "features-96k-sort": Case(
        FEATURES, "argsort (formula)", sorted_features, 96000, 512, 1, slow=True
    ),
    "neighbors": Case("25 neighbours of every image", "ours", ours_neighbors, MARKET_ALL, 512, 2),
    "neighbors-faiss": Case(
        "25 neighbours of every image", "faiss", faiss_neighbors, MARKET_ALL, 512, 2, needs=PEER
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
    "k_reciprocal-fastreid": Case(
        "k-reciprocal distances",
        "fast-reid with faiss (Jaccard of all pairs)",
        fastreid_k_reciprocal,
        *(MARKET, 512, 1, True, FASTREID),
    ),
    "k_reciprocal-scores": Case(
        "scores after k-reciprocal", "ours", ours_rerank_scores("k_reciprocal"), MARKET, 512, 2
    ),
    "k_reciprocal-dense": Case(
        "k-reciprocal distances", "dense (formula)", dense_k_reciprocal, MARKET, 512, 1, slow=True
    ),
    "k_reciprocal-torchreid": Case(
        "k-reciprocal distances", "torchreid", torchreid_k_reciprocal, MARKET, 512, 1, True, PEER
    ),
}
MAPPED = {
    f"{name}-{kind}": Case(
        f"scores{what}, {size}", "ours", run, gallery, 512, 1, queries=queries, mapped=True
    )
    for name, size, queries, gallery in (
        ("msmt17", "MSMT17's size", 11659, 82161),
        ("market500k", "Market-1501 and 500,000 distractors", QUERIES, MARKET_ALL + 500000),
    )
    for kind, what, run in (
        ("scores", "", ours_features),
        ("ecn", " after ECN", ours_rerank_scores("ecn")),
    )
}


def make_input(case: Case, quick: bool, labels: str | None = None) -> dict[str, np.ndarray]:
    scale = 0.02 if quick else 1.0
    sizes = int(case.queries * scale), int(case.gallery * scale)
    if case.mapped:
        return map_files(*sizes, case.size)
    data = make_data(*sizes, case.size, labels=labels)
    if case.distance:
        add_distance(data)
    return data


def map_files(*sizes: int) -> dict[str, np.ndarray]:
    """The same from files: another process writes them, so that this one's peak has them mapped."""
    from mros_jax.retrieval.descriptors import load_features

    directory = tempfile.mkdtemp(prefix="bench_retrieval_")
    atexit.register(shutil.rmtree, directory)
    make = multiprocessing.get_context("spawn").Process(
        target=make_data, args=sizes, kwargs={"directory": directory}
    )
    make.start()
    make.join()
    return load_features(directory)


def run_once(case: Case, data: dict[str, np.ndarray]) -> dict[str, float]:
    start, used = time.perf_counter(), time.process_time()
    check = case.run(data)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "cpu": cpu, "peak_gb": peak, "check": check}


def measure(case: Case, quick: bool) -> dict[str, Any]:
    """Run one of our cases in this process."""
    data = make_input(case, quick)
    times = [run_once(case, data)["seconds"] for _ in range(case.repeats + 1)]
    return {"seconds": min(times), "first": times[0], "gallery": len(data["gallery_pids"])}


def serve(case: Case, args: argparse.Namespace) -> None:
    """Run a case in this process, once for each line of the input."""
    data = make_input(case, args.quick, args.labels)
    print(flush=True)
    for _ in sys.stdin:
        print(json.dumps(run_once(case, data)), flush=True)


class Child:
    """A process in which a case runs."""

    def __init__(self, name: str, case: Case, args: argparse.Namespace):
        self.name, self.case = name, case
        self.runs: list[dict[str, Any]] = []
        python = (args.peer_python if case.needs else None) or sys.executable
        options = [f"--labels={args.labels}"] * bool(args.labels) + ["--quick"] * args.quick
        options += [f"--fastreid={args.fastreid}"] * (case.needs == FASTREID)
        path = {"PYTHONPATH": os.path.abspath(case.package)} if case.package else {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            [python, __file__, "--child", name.removesuffix(BEFORE), *options],
            env=os.environ | path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def wait(self) -> str:
        """The next line that it prints; what it says if it has ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:]
            print(f"{self.name} failed: {' '.join(last)}", file=sys.stderr)
        return line

    def run(self) -> bool:
        """Run the case once more; whether that worked."""
        if self._process.poll() is not None:
            return False
        print(file=self._process.stdin, flush=True)
        line = self.wait()
        if line:
            self.runs.append(json.loads(line))
        return bool(line)

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()


def take_turns(cases: dict[str, Case], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run cases that compute the same, in turns."""
    children = [Child(name, case, args) for name, case in cases.items()]
    children = [child for child in children if child.wait()]
    # The first call compiles; what takes a minute is timed at once.
    warm = {
        child.name
        for child in children
        if child.case.who.startswith("ours") and child.case.gallery < 500000 and child.run()
    }
    for turn in range(max((child.case.repeats for child in children), default=0)):
        for child in children:
            if turn < child.case.repeats:
                child.run()
    results: dict[str, dict[str, Any]] = {}
    for child in children:
        child.end()
        timed = [run["seconds"] for run in child.runs[child.name in warm :]]
        if timed:
            results[child.name] = child.runs[-1] | {
                "seconds": min(timed),
                "cpu": min(run["cpu"] for run in child.runs[child.name in warm :]),
                "first": child.runs[0]["seconds"],
                "peak_gb": child.runs[0]["peak_gb"],
                "turns": timed,
            }
    ours: list[float] = next((got["turns"] for got in results.values()), [])
    for got in results.values():
        got["ratio"] = statistics.median(a / b for a, b in zip(got["turns"], ours, strict=False))
    return results


def format_table(results: dict[str, dict[str, Any]], cases: dict[str, Case]) -> str:
    from scripts import common  # which the interpreter of the peers does not have

    lines = [
        f"Measured by `scripts/bench_retrieval.py` on {common.describe_machine()}. "
        f"{QUERIES:,} queries; seconds without compiling (in brackets: the first call), "
        "peak memory of the process after the first call, ratio of the seconds to the first row of "
        "the same, processor time.",
        "",
        "| what | gallery | numbers | by | seconds | peak GB | check | ratio | CPU s |",
        "| --- | --: | --: | --- | --: | --: | --: | --: | --: |",
    ]
    for name, got in results.items():
        case = cases[name]
        first = f" ({got['first']:.1f})" if got["first"] > 1.2 * got["seconds"] else ""
        lines.append(
            f"| {case.title} | {case.gallery:,} | {case.size:,} | {case.who} | "
            f"{got['seconds']:.2f}{first} | {got['peak_gb']:.2f} | {got['check']:.6g} | "
            f"{got['ratio']:.2f} | {got['cpu']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1/50 of the size: a smoke test")
    parser.add_argument("--slow", action="store_true", help="also peers of a minute or 10 GB")
    parser.add_argument("--peer_python", help="an interpreter with faiss and torchreid")
    parser.add_argument("--fastreid", help="a clone of fast-reid with its evaluator compiled")
    parser.add_argument("--before", help="a clone of this project at another commit")
    parser.add_argument("--labels", help="an .npz file with Market-1501's labels")
    parser.add_argument("--mapped", action="store_true", help="only large ones from mapped files")
    parser.add_argument("--only", help="names of cases, with commas")
    parser.add_argument("--markdown", type=pathlib.Path, help="also write the table to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cases = CASES | MAPPED
    if args.child:
        if args.fastreid:
            root = pathlib.Path(args.fastreid, "fastreid")
            sys.path[:0] = [str(root), str(root / "evaluation" / "rank_cylib")]
        serve(cases[args.child], args)
        return 0
    if args.labels and args.quick:
        parser.error("--quick has random labels: leave out --labels")
    if args.only:
        unknown = set(args.only.split(",")) - set(cases)
        if unknown:
            parser.error(f"no case {', '.join(unknown)}; there are {', '.join(cases)}")
        chosen = {name: cases[name] for name in args.only.split(",")}
    else:
        chosen = MAPPED if args.mapped else CASES
        chosen = {n: c for n, c in chosen.items() if args.slow or args.quick or not c.slow}
    if args.labels:
        chosen = {n: c for n, c in chosen.items() if c.gallery in (MARKET, MARKET_ALL)}
    chosen = {n: c for n, c in chosen.items() if not c.needs or getattr(args, c.needs)}
    if args.before:
        if not pathlib.Path(args.before, "mros_jax").is_dir():
            parser.error(f"--before: {args.before} is no clone of this project")
        for name, case in [item for item in chosen.items() if item[1].who.startswith("ours")]:
            who = f"{case.who}, before"
            chosen[name + BEFORE] = dataclasses.replace(case, who=who, package=args.before)
        chosen = dict(sorted(chosen.items(), key=lambda item: list(map(str, item[1].group()))))
    results = {}
    groups = itertools.groupby(chosen.items(), lambda item: item[1].group())
    for _, group in groups:
        for name, got in take_turns(dict(group), args).items():
            results[name] = got
            print(f"{name}: {got['seconds']:.2f} s, {got['peak_gb']:.2f} GB", file=sys.stderr)
    from scripts import common  # which the interpreter of the peers does not have

    common.publish(format_table(results, chosen), args.markdown)
    return 0


if __name__ == "__main__":
    if "--child" in sys.argv:  # perhaps by the interpreter of the peers, without this library
        sys.exit(main())
    from mros_jax import console

    sys.exit(console.run(main))

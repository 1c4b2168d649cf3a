"""Times what the explorer computes, on a run of Market-1501's size.

    python -m scripts.bench_explorer --quick     # 1/50 of the size: a smoke test
    python -m scripts.bench_explorer

Descriptors of 512 numbers are random, 3,368 queries in a gallery of 19,732; a JPEG of 64 x 128
pixels stands for every image of a person. The times of lists are of the whole view: ranked, marked,
split into parts, pictures read and encoded, written as HTML.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import trinet
from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.explorer.exploration import KINDS, Exploration
from mros_jax.explorer.page import load_views
from mros_jax.files import write_json
from mros_jax.retrieval import descriptors
from mros_jax.runs import provenance
from mros_jax.runs.results import evaluate_features
from mros_jax.runs.run import FORMAT, Run
from scripts import common
from scripts.bench_retrieval import MARKET_ALL, QUERIES, make_data

SIZE = 512
_LISTS = 50


def write_run(
    path: pathlib.Path, root: pathlib.Path, data: Mapping[str, np.ndarray], config: ConfigDict
) -> pathlib.Path:
    """Writes what the explorer reads of a run, and the images that it was tested on.

    Args:
        path: the run's directory.
        root: where the images go, in Market-1501's layout; those of a person are the same picture.
        data: features, pids and camids of queries and gallery.
        config: of the run; its data set becomes these images.
    """
    rng = np.random.default_rng(0)
    features = dict(data)
    people: dict[int, pathlib.Path] = {}
    for split, folder in (("query", "query"), ("gallery", "bounding_box_test")):
        (root / folder).mkdir(parents=True)
        labels = zip(data[f"{split}_pids"], data[f"{split}_camids"], strict=True)
        names = [
            f"{pid:04d}_c{camid}s1_{i:06d}_00.jpg".replace("-001", "-1")
            for i, (pid, camid) in enumerate(labels)
        ]
        for name, pid in zip(names, data[f"{split}_pids"].tolist(), strict=True):
            if pid not in people:
                people[pid] = root / f"{pid}.jpg"
                pixels = np.kron(rng.integers(0, 256, (8, 4, 3), np.uint8), np.ones((16, 16, 1)))
                Image.fromarray(pixels.astype(np.uint8)).save(people[pid])
            (root / folder / name).hardlink_to(people[pid])
        features[f"{split}_names"] = np.array(names)
        features[f"{split}_fingerprint"] = np.array("benchmark")
    (root / "bounding_box_train").mkdir()
    (root / "bounding_box_train" / "9999_c1s1_000000_00.jpg").hardlink_to(people[min(people)])
    with config.unlocked():
        config.dataset.name, config.dataset.root = "market1501", str(root)
    dataset = configs.load_dataset(config)
    path.mkdir(parents=True)
    run = Run(path)
    prints = {split.name: "benchmark" for split in dataset.splits}
    write_json(run.record_file, {"format": FORMAT, **provenance.describe_run(dataset, prints)})
    write_json(run.config_file, config.to_dict())
    descriptors.save_features(path / "features.npz", features)
    results = evaluate_features(
        features,
        reranks=configs.make_reranks(config),
        dataset=dataset.name,
        system=config.name,
        flip_test=False,
        crops="none",
    )
    write_json(run.results_file, results)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="1/50 of the size: a smoke test")
    args = parser.parse_args(argv)
    parallel.use_compilation_cache()
    config = trinet.get_config()
    with config.unlocked():
        config.network.embedded = SIZE
        config.eval.rerank = ("ecn", "k_reciprocal")
    share = 50 if args.quick else 1
    data = make_data(QUERIES // share, MARKET_ALL // share, SIZE)
    with tempfile.TemporaryDirectory() as directory:
        base = pathlib.Path(directory)
        path = write_run(base / "run", base / "images", data, config)
        start = time.perf_counter()
        run = Exploration(path)
        print(f"opening, with both re-rankings: {time.perf_counter() - start:.1f} s")
        views = load_views()
        taken = []
        for query in np.linspace(0, len(data["query_pids"]) - 1, _LISTS).astype(int).tolist():
            start = time.perf_counter()
            str(views.query_view([(run.title, run.edges, run.list_query(query, 10))]))
            taken.append(1000 * (time.perf_counter() - start))
        print(
            f"three ranked lists of a query: {np.median(taken):.0f} ms, the median of {_LISTS} "
            f"({min(taken):.0f} to {max(taken):.0f}; the first {taken[0]:.0f})"
        )
        for name, work in (
            ("verification scores", lambda: run.verification),
            ("hard pairs", lambda: [run.list_hard_pairs(kind, 20) for kind in KINDS]),
            ("map", lambda: run.map_descriptors("camera")),
        ):
            start = time.perf_counter()
            work()
            print(f"{name}, once: {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

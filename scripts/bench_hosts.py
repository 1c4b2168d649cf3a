"""Times evaluation by one process and by two that work together, in turns, a core for each.

    python -m scripts.bench_hosts --quick     # a smoke test
    python -m scripts.bench_hosts

Descriptors come from a config's network with random weights and random images; the scores are of
random descriptors of Market-1501's shape. Each process is bound to a core of its own by `taskset`.
Every part is called once to be compiled, then timed; of all turns the best counts. Beside the time
stands the processor time of the process that needs most of it, which does not depend on what else
the machine does.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from mros_jax import console, parallel
from mros_jax.inference import make_embedder
from mros_jax.retrieval import AQE, ECN, KReciprocal, Placement, evaluate
from mros_jax.retrieval.rerank import Rerank
from mros_jax.training import recipe
from scripts import common
from scripts.bench_retrieval import ARRAYS, MARKET, QUERIES, make_data

METHODS = {"CMC, mAP, mINP": None, "ECN": ECN(), "k-reciprocal": KReciprocal(), "AQE": AQE()}


def list_parts(config: ConfigDict, args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """What is timed; each returns a number that must be the same for any number of processes."""
    config = config.copy_and_resolve_references()
    config.weights = "none"
    parts = recipe.build(config, num_classes=10, steps_per_epoch=10)
    embedder = make_embedder(config, parts.network, parts.state.eval_variables)
    shape = (args.images, config.input.height, config.input.width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data = make_data(args.queries, args.gallery, 512)

    def embed() -> float:
        batch = min(64, args.images // 4)
        return float(np.abs(embedder.embed(images, batch_size=batch, together=True)).mean())

    def score(method: Rerank | None) -> float:
        arrays = (data[name] for name in ARRAYS)
        return evaluate(*arrays, rerank=method, placement=Placement(together=True)).mAP

    def bind(method: Rerank | None) -> Callable[[], float]:
        return lambda: score(method)

    return {f"descriptors of {args.images:,} images": embed} | {
        f"{name}, {args.queries:,} x {args.gallery:,}": bind(method)
        for name, method in METHODS.items()
    }


def measure(config: ConfigDict, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time all parts, in one of the processes of a run."""
    parallel.use_compilation_cache()
    parallel.initialize(args.coordinator_address, args.num_processes, args.process_id)
    found = {}
    for name, part in list_parts(config, args).items():
        part()
        parallel.agree(True)  # all begin at once
        since, cpu = time.perf_counter(), time.process_time()
        check = part()
        seconds, busy = time.perf_counter() - since, time.process_time() - cpu
        busiest = max(parallel.gather(functools.partial(float, busy)))
        found[name] = {"seconds": seconds, "busy": busiest, "check": check}
    return found


def spawn(count: int, words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Let so many processes measure, each on a core of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for i in range(count):
        command = ["taskset", "-c", str(cores[i]), sys.executable, "-m", "scripts.bench_hosts"]
        command += [*words, "--child", f"--coordinator_address={address}"]
        command += [f"--num_processes={count}", f"--process_id={i}"]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=common.ROOT, stdout=pipe, text=True))
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    measured: dict[str, dict[str, float]] = json.loads(outputs[0].strip().splitlines()[-1])
    return measured


def best(turns: Sequence[dict[str, dict[str, float]]], name: str, field: str) -> float:
    """The least of all turns."""
    return min(turn[name][field] for turn in turns)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not any(word.partition("=")[0] == "--config" for word in words):
        words.append("--config=configs/demo.py")
    parser = common.make_parser(__doc__)
    parser.add_argument("--images", type=int, default=512, help="to make descriptors of")
    parser.add_argument("--queries", type=int, default=QUERIES, help="descriptors of queries")
    parser.add_argument("--gallery", type=int, default=MARKET, help="and of the gallery")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    common.add_repeats(parser, 3)
    common.add_markdown(parser)
    parallel.add_arguments(parser)
    config, args = common.parse_with_config(parser, words)
    if args.quick:
        args.images, args.queries, args.gallery, args.repeats = 32, 70, 300, 1
    if args.child:
        found = measure(config, args)
        if parallel.is_main_process():
            print(json.dumps(found))
        return 0
    turns: dict[int, list[dict[str, dict[str, float]]]] = {1: [], 2: []}
    for _ in range(args.repeats):
        for count in turns:
            turns[count].append(spawn(count, words))
    rows = []
    for name in turns[1][0]:
        one, two = (best(turns[n], name, "seconds") for n in (1, 2))
        times = (one, two, one / two, *(best(turns[n], name, "busy") for n in (1, 2)))
        same = len({turn[name]["check"] for n in turns for turn in turns[n]}) == 1
        rows.append((name, *(f"{value:.2f}" for value in times), "yes" if same else "no"))
    header = ("what", "1 process, s", "2 processes, s", "ratio", "CPU s of one", "of each of two")
    table = common.format_table((*header, "same number"), rows)
    text = f"{common.describe_config(config)}; {common.describe_machine()}\n\n{table}"
    common.publish(text, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

"""Measures all that matters on one accelerator in a single run, and prints one table.

    python -m scripts.bench_gpu                                   # on a GPU
    python -m scripts.bench_gpu --part step,feed --json gpu.json
    python -m scripts.bench_gpu --small                           # a smoke test, on a CPU as well

step       the training step of configs/mros.py, 128 images of 384 x 128, with the data path
peer       the step on images that are ready, in JAX and in PyTorch with the parity tests' network
feed       steps of the training loop, with the images on the device and in host memory
retrieval  evaluation and re-ranking at Market-1501's size, descriptors of 15,360 numbers
recipe     the whole recipe on the embedded data set, by the training command with empty caches

Each measurement has a process of its own, one after the other: its peak memory is its own, and
PyTorch and JAX do not share a device. One that fails says why in the table, the others go on, and
the exit code is 1. Of several devices the first is used.

A row of steps is the median of its rounds; the first call and one round warm up, and a round is
waited for at its end only, as in training.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.data.batches import make_sampler
from mros_jax.errors import UserError
from mros_jax.files import write_json
from mros_jax.runs.run import Run
from mros_jax.training.feed import Feed
from scripts import bench_model, bench_retrieval, common, compile_for_tpu

PARTS = ("step", "peer", "feed", "retrieval", "recipe")
CONFIG = ("--config=configs/mros.py:synthetic",)
SMALL = (
    "--config=configs/demo.py",
    "--config.dataset.preset=small",
    "--config.batch.identities=4",
    "--config.batch.images=2",
    "--config.input.width=32",
    "--config.eval.rerank_options.ecn.k=5",
    "--config.log_every_steps=2",
)

# TFLOP/s of dense products in bfloat16, TF32 and float32 by `device_kind`. NVIDIA's papers "H100
# Tensor Core GPU Architecture", "A100 Tensor Core GPU Architecture" and "Ada GPU Architecture"
# (RTX 4090: with float32 accumulators), and the data sheets of H100 NVL, H200, L4 and L40S; those
# give tensor cores with sparsity, which is twice the dense figure.
PEAKS = {
    "NVIDIA H200": (989.5, 494.7, 67.0),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 66.9),
    "NVIDIA H100 NVL": (835.5, 417.5, 60.0),
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.2),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0, 19.5),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 156.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 156.0, 19.5),
    "NVIDIA L40S": (362.05, 183.0, 91.6),
    "NVIDIA L4": (121.0, 60.0, 30.3),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
}
PRODUCTS = ("bfloat16", "TF32", "float32")

HEADER = (
    *("part", "what", "seconds", "images/s", "range", "TFLOP/s", "% of peak"),
    *("device GB", "host GB", "remark"),
)
Row = dict[str, Any]


class Case(NamedTuple):
    """A measurement in a process of its own.

    Attributes:
        part: one of `PARTS`.
        what: of its row; `{products}` is how products are made.
        measure: the cells of its row, or of several that say `what` each of them is.
        products: one of `PRODUCTS`; "default": what JAX takes for float32; "": FLOP do not count.
        environment: variables of the process.
    """

    part: str
    what: str
    measure: Callable[[argparse.Namespace], list[Row]]
    products: str = ""
    environment: Mapping[str, str] = {}


def make_config(args: argparse.Namespace, **overrides: Any) -> ConfigDict:
    """The config that all parts measure, or its small stand-in."""
    config, _ = configs.parse_config(list_words(args, **overrides))
    assert config is not None
    return config


def list_words(args: argparse.Namespace, **overrides: Any) -> list[str]:
    """The same as words of a command line."""
    overrides = {"weights": "none", **overrides}
    fields = [f"--config.{name}={value}" for name, value in overrides.items()]
    return [*(SMALL if args.small else CONFIG), *fields]


def find_counts(args: argparse.Namespace) -> dict[str, int]:
    """Training images and identities ("classes") of the step's data: Market-1501's, or a few."""
    if args.small:
        return {"train": 96, "classes": 12}
    return compile_for_tpu.find_counts(make_config(args))


def name_products(device: jax.Device) -> str:
    """How JAX makes products of float32 numbers by default (see `jax.lax.Precision`)."""
    if device.platform == "tpu":
        return "bfloat16"
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]
    ampere = device.platform == "gpu" and generation.isdigit() and int(generation) >= 8
    return "TF32" if ampere else "float32"


def time_rounds(
    start: Callable[[], Any], wait: Callable[[Any], object], images: int, args: argparse.Namespace
) -> Row:
    """Cells of a step.

    Args:
        start: begins a step.
        wait: for what `start` returned, which ends after all steps before it.
        images: in a step.
        args: its `steps` make a round, of which there are `repeats`.
    """
    since = time.perf_counter()
    wait(start())
    first = time.perf_counter() - since
    seconds = []
    for _ in range(1 + args.repeats):
        since = time.perf_counter()
        for _ in range(args.steps):
            last = start()
        wait(last)
        seconds.append((time.perf_counter() - since) / args.steps)
    seconds = seconds[1:]
    return {
        "seconds": statistics.median(seconds),
        "images_per_second": images / statistics.median(seconds),
        "range": (images / max(seconds), images / min(seconds)),
        "remark": f"first call {first:.1f} s",
    }


def measure_memory(who: int = resource.RUSAGE_SELF) -> Row:
    """Cells of memory at its peak: the host's, and of this process the device's if it tells."""
    cells = {"host_gb": resource.getrusage(who).ru_maxrss * 1024 / 1e9}
    if who == resource.RUSAGE_SELF:
        told = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in told:
            cells["device_gb"] = told["peak_bytes_in_use"] / 1e9
    return cells


def measure_step(args: argparse.Namespace, dtype: str, precision: str | None) -> list[Row]:
    """The step that training runs, on stored images of noise that are on the device."""
    jax.config.update("jax_default_matmul_precision", precision)
    config = make_config(args, dtype=dtype)
    sampler = make_sampler(config.batch.to_dict())
    counts = find_counts(args)
    shape = (counts["train"], *compile_for_tpu.STORED, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(len(images), dtype=np.int32) % counts["classes"]
    indices = sampler.plan(labels, np.zeros_like(labels), seed=config.seed, epoch=0)[0]
    devices = jax.devices()[:1]
    data = parallel.replicate({"images": images, "labels": labels}, devices)
    batch = parallel.split({"indices": indices}, devices)
    step = common.Step(config, counts["classes"], data, batch, devices=devices)
    cells = time_rounds(step.start, jax.block_until_ready, sampler.size, args)
    return [cells | measure_memory()]


def measure_jax(args: argparse.Namespace, dtype: str) -> list[Row]:
    """The step on images that are ready, for comparison with `measure_torch`."""
    config = make_config(args, dtype=dtype)
    num_classes = find_counts(args)["classes"]
    made = bench_model.make_batch(config, num_classes)
    devices = jax.devices()[:1]
    step = common.Step(
        config,
        num_classes,
        None,
        parallel.split(made, devices),
        augment_batch=common.keep_images,
        devices=devices,
    )
    cells = time_rounds(step.start, jax.block_until_ready, len(made["labels"]), args)
    return [cells | measure_memory()]


def measure_torch(
    args: argparse.Namespace, dtype: str, channels_last: bool, compiled: bool
) -> list[Row]:
    """The same in PyTorch, with TF32 products where the GPU has them, as JAX makes them."""
    import torch

    torch.set_float32_matmul_precision("high")  # convolutions are TF32 by default
    torch.backends.cudnn.benchmark = True
    config = make_config(args, dtype=dtype)
    device = bench_model.find_torch_device(args.platform)
    steps, wait = bench_model.make_torch_steps(
        config,
        find_counts(args)["classes"],
        device,
        channels_last=channels_last,
        compiled=compiled,
    )
    size = make_sampler(config.batch.to_dict()).size
    cells = time_rounds(steps["training step"], lambda _: wait(), size, args) | measure_memory()
    if device == "cuda":
        cells["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return [cells]


def measure_feed(args: argparse.Namespace, fraction: float) -> list[Row]:
    """Steps with the batches that training gets, epoch after epoch."""
    words = {"dataset.device_fraction": fraction, "dataset.cache_dir": args.scratch / "images"}
    config = make_config(args, dtype="bfloat16", **words)
    dataset = configs.load_dataset(config)
    feed = Feed(config, dataset)
    batches = itertools.chain.from_iterable(feed.epoch(i) for i in range(config.num_epochs))
    step = common.Step(config, dataset.num_classes, feed.data, None)
    cells = time_rounds(
        lambda: step.start(next(batches)), jax.block_until_ready, feed.sizes.batch, args
    )
    where = "in host memory" if feed.data is None else "on the device"
    cells["remark"] = f"images {where}; {cells['remark']}"
    return [cells | measure_memory()]


def measure_retrieval(args: argparse.Namespace, case: bench_retrieval.Case) -> list[Row]:
    """A case of `bench_retrieval`, from descriptors on the host to scores on the host."""
    found = bench_retrieval.measure(case, args.small)
    remark = f"gallery {found['gallery']:,}; first call {found['first']:.1f} s"
    return [{"seconds": found["seconds"], "remark": remark} | measure_memory()]


def measure_recipe(args: argparse.Namespace) -> list[Row]:
    """A whole run with empty caches, and its parts by when its files appear."""
    workdir = args.scratch / "recipe"
    overrides = {"dtype": "bfloat16", "dataset.cache_dir": workdir / "images"}
    if args.epochs:
        overrides["num_epochs"] = args.epochs
    run = Run(workdir / "run")
    words = list_words(args, **overrides)
    with common.Training(words, run.path, workdir / "xla") as training:
        ready = training.wait_for(run.record_file)
        stepped = training.wait_for(run.timing_file)
        scored = training.wait_for(run.results_file)
        ended = training.wait()
    # The log of speed leaves out evaluations and checkpoints.
    first, *others = run.timing
    stepping = sum(record["seconds"] for record in others)
    steps = others[-1]["step"] - first["step"] if others else 0
    config = make_config(args, **overrides)
    images = steps * make_sampler(config.batch.to_dict()).size
    parts: dict[str, Row] = {
        "start-up, images rendered": {"seconds": ready},
        f"compiled, first {first['step']} steps": {"seconds": stepped - ready},
        f"the other {steps:,} steps": {"seconds": stepping},
        "evaluations and checkpoints": {"seconds": scored - stepped - stepping},
        "report": {"seconds": ended - scored},
    }
    if images:
        parts[f"the other {steps:,} steps"]["images_per_second"] = images / stepping
    scores = run.rankings[0]
    whole = {
        "seconds": ended,
        "remark": f"mAP {100 * scores['mAP']:.1f}, Rank-1 {100 * scores['cmc'][0]:.1f}",
        **measure_memory(resource.RUSAGE_CHILDREN),
    }
    rows = parts | {f"all of {config.num_epochs} epochs": whole}
    return [{"what": what, **cells} for what, cells in rows.items()]


# Processes that are to leave the accelerator alone.
ON_CPU = {"JAX_PLATFORMS": "cpu"}
LAYOUTS = {
    "eager": (False, False),
    "channels last": (True, False),
    "channels last, compiled": (True, True),
}
FLOAT32 = "float32 ({products} products)"
SCORES = {
    "CMC, mAP, mINP": (bench_retrieval.ours_features, bench_retrieval.MARKET),
    "with ECN": (bench_retrieval.ours_rerank_scores("ecn"), bench_retrieval.MARKET_ALL),
    "with k-reciprocal": (
        bench_retrieval.ours_rerank_scores("k_reciprocal"),
        bench_retrieval.MARKET,
    ),
}


def list_cases() -> list[Case]:
    """All measurements, in the order of the table."""
    bind = functools.partial
    cases = [
        Case(
            "step",
            f"training step, {what}",
            bind(measure_step, dtype=dtype, precision=precision),
            products,
        )
        for what, dtype, products, precision in (
            ("bfloat16", "bfloat16", "bfloat16", None),
            (FLOAT32, "float32", "default", None),
            (FLOAT32, "float32", "float32", "highest"),
        )
    ]
    for what, dtype, products in (
        ("bfloat16", "bfloat16", "bfloat16"),
        (FLOAT32, "float32", "default"),
    ):
        cases.append(Case("peer", f"JAX, {what}", bind(measure_jax, dtype=dtype), products))
        for name, (channels_last, compiled) in LAYOUTS.items():
            measure = bind(
                measure_torch, dtype=dtype, channels_last=channels_last, compiled=compiled
            )
            cases.append(Case("peer", f"PyTorch, {name}, {what}", measure, products, ON_CPU))
    cases += [
        Case("feed", "device_fraction 0.5", bind(measure_feed, fraction=0.5)),
        Case("feed", "device_fraction 0", bind(measure_feed, fraction=0.0)),
    ]
    for what, (run, gallery) in SCORES.items():
        case = bench_retrieval.Case(what, "ours", run, gallery, 15360, 2)
        cases.append(Case("retrieval", what, bind(measure_retrieval, case=case)))
    return [*cases, Case("recipe", "training command", measure_recipe)]


def describe_device(args: argparse.Namespace) -> dict[str, str]:
    """What is measured, in words and as the other parts need it."""
    device = jax.devices()[0]
    names = ("flax", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch")
    installed = {x.metadata["Name"].replace("_", "-") for x in importlib.metadata.distributions()}
    what = common.describe_config(make_config(args, dtype="bfloat16"))
    packages = [name for name in names if name in installed]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "products": name_products(device),
        "text": f"{what} and float32; {common.describe_machine(*packages)}",
    }


def count_flops(args: argparse.Namespace) -> float:
    """FLOP of a training step, as XLA counts them in its program for a CPU before it is compiled.

    A GPU's compiled program has its products in calls of libraries, which JAX does not count.
    """
    config = make_config(args, dtype="bfloat16")
    [job] = compile_for_tpu.make_trainings(config, jax.devices()[:1], None, find_counts(args))
    cost: Any = job.lower(job.batch).cost_analysis()
    return float(cost["flops"])


def find_torch(args: argparse.Namespace) -> str:
    """The device that PyTorch has; fails where it has none."""
    return bench_model.find_torch_device(args.platform)


PROBES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "device": describe_device,
    "flops": count_flops,
    "torch": find_torch,
}


def run_child(name: str, args: argparse.Namespace) -> int:
    """Print what a probe or the case of a number finds, or why it fails, as a line of JSON."""
    run = PROBES[name] if name in PROBES else list_cases()[int(name)].measure
    try:
        answer = {"found": run(args)}
    except Exception as error:
        known = isinstance(error, UserError)
        print(error if known else traceback.format_exc(), file=sys.stderr)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        answer = {"failed": lines[-1 if known else 0][:200]}
    print(json.dumps(answer))
    return 0


class Runner:
    """Runs measurements one after the other, each in a process of its own.

    Args:
        words: this command's arguments.
    """

    def __init__(self, words: Sequence[str]):
        self._words = list(words)
        # Of several GPUs, the first that is visible.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        self._environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}

    def add(self, word: str) -> None:
        """Give an argument to all processes from now on."""
        self._words.append(word)

    def __call__(self, name: str, environment: Mapping[str, str]) -> dict[str, Any]:
        """What `run_child` prints."""
        command = [sys.executable, "-m", "scripts.bench_gpu", *self._words, f"--child={name}"]
        done = subprocess.run(
            command,
            cwd=common.ROOT,
            env={**self._environment, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            return {"failed": f"its process ended with {done.returncode}"}
        answer: Row = json.loads(lines[-1])
        return answer


def compare_with_peak(row: Row, flops: float, peaks: Sequence[float]) -> None:
    """Add FLOP/s to the row of a step, and their share of the peak where that is known."""
    row["tflops"] = flops / row["seconds"] / 1e12
    place = PRODUCTS.index(row["products"])
    if place < len(peaks):
        row["peak_share"] = row["tflops"] / peaks[place]


def measure(args: argparse.Namespace, runner: Runner) -> tuple[dict[str, str], list[Row]]:
    """The device, and the rows of all parts.

    Raises:
        UserError: JAX does not start, or has no accelerator for a measurement in full size.
    """
    answer = runner("device", {})
    if "failed" in answer:
        raise UserError(f"JAX does not start: {answer['failed']}")
    device = answer["found"]
    if device["platform"] == "cpu" and not args.small:
        raise UserError(
            "JAX has no accelerator here (pip install 'mros_jax[cuda]' for a GPU); --small makes a "
            "smoke test on a CPU"
        )
    runner.add(f"--platform={device['platform']}")
    peaks = args.peak_tflops or PEAKS.get(device["kind"], ())
    flops = None
    if {"step", "peer"} & set(args.part):
        flops = runner("flops", ON_CPU).get("found")
    without_torch = runner("torch", ON_CPU).get("failed") if "peer" in args.part else None
    rows: list[Row] = []
    if without_torch:
        rows.append({"part": "peer", "what": "PyTorch", "remark": without_torch})
    for number, case in enumerate(list_cases()):
        with_torch = case.what.startswith("PyTorch")
        if case.part not in args.part or (with_torch and without_torch):
            continue
        products = device["products"] if case.products == "default" else case.products
        named = {"part": case.part, "what": case.what.format(products=products)}
        print(f"{named['part']}: {named['what']}", file=sys.stderr)
        answer = runner(str(number), case.environment)
        if "failed" in answer:
            found: list[Row] = [{"failed": answer["failed"], "remark": answer["failed"]}]
        else:
            found = answer["found"]
        for cells in found:
            row = {**named, **cells}
            if products and "seconds" in row:
                row["products"] = products
                if flops:
                    compare_with_peak(row, flops, peaks)
            rows.append(row)
            print("    " + " | ".join(make_cells(row)[1:]), file=sys.stderr)  # should it be stopped
    return device, sorted(rows, key=lambda row: PARTS.index(row["part"]))


def make_cells(row: Row) -> tuple[str, ...]:
    """The cells of `HEADER`."""

    def show(name: str, form: str, scale: float = 1.0) -> str:
        return format(scale * row[name], form) if name in row else "-"

    low, high = row.get("range", (None, None))
    return (
        row["part"],
        row["what"],
        show("seconds", ".4g"),
        show("images_per_second", ",.0f"),
        "-" if low is None else f"{low:,.0f}-{high:,.0f}",
        show("tflops", ".3g"),
        show("peak_share", ".1f", 100),
        show("device_gb", ".2f"),
        show("host_gb", ".2f"),
        row.get("remark", ""),
    )


def read_peaks(text: str) -> tuple[float, ...]:
    """TFLOP/s with commas, in the order of `PRODUCTS`."""
    peaks = tuple(float(word) for word in text.split(","))
    if len(peaks) > len(PRODUCTS) or min(peaks) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not one to three numbers above 0")
    return peaks


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = common.make_parser(__doc__)
    common.add_part(parser, PARTS)
    parser.add_argument(
        "--small", action="store_true", help="a tiny network, few images, one round"
    )
    common.add_repeats(parser, 5)
    parser.add_argument("--steps", type=console.count, default=20, help="steps of a timed run")
    parser.add_argument("--epochs", type=console.count, help="of the recipe (default: all)")
    parser.add_argument(
        "--peak_tflops",
        type=read_peaks,
        metavar="BF16[,TF32[,F32]]",
        help="the device's peaks, where the script does not know them",
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write all numbers to this file")
    common.add_markdown(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--platform", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.small:
        args.repeats, args.steps, args.epochs = 1, 2, 1
    if args.child:
        return run_child(args.child, args)
    with tempfile.TemporaryDirectory() as scratch:
        device, rows = measure(args, Runner([*words, f"--scratch={scratch}"]))
    if args.json:
        write_json(args.json, {"device": device, "rows": rows})
    table = common.format_table(HEADER, map(make_cells, rows))
    common.publish(f"{device['text']}\n\n{table}", args.markdown)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(console.run(main))

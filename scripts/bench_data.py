"""What the data path costs: decoding, augmentation, epoch plans, and its share of a training step.

python scripts/bench_data.py --markdown bench_data.md

The images are JPEG files of 128 x 64 in memory: `--root`'s training images (in Market-1501's
layout) or, by default, those of the tests, repeated. The comparison augments image by image with
PIL and NumPy in worker processes that leave their batches in shared memory, which is what
torchreid's transforms amount to: decode, resize, flip, pad and crop, to float, normalise, erase.
"""

import concurrent.futures
import functools
import io
import math
import multiprocessing
import os
import pathlib
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image, ImageOps

from mros_jax.data import augment, batches, store
from mros_jax.data.datasets import sources, splits
from mros_jax.data.decoding import decode_image
from mros_jax.data.images import EncodedImages
from mros_jax.runs import provenance

_ROOT = flags.DEFINE_string("root", None, "Directory in Market-1501 layout.")
_IMAGES = flags.DEFINE_integer("images", 12_936, "Images to decode.", 1)
_BATCH = flags.DEFINE_integer("batch", 128, "Images augmented at once.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs; the best is shown.", 1)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Threads and processes.", 1)
_BACKBONE = flags.DEFINE_string("backbone", "resnet50", "Network of the training step.")
_STEP_BATCH = flags.DEFINE_integer("step_batch", 8, "Images in the timed training step.", 2)
_BIG = flags.DEFINE_integer("big", 1_000_000, "Identities in the large epoch plan.", 32)
_PARTS = flags.DEFINE_multi_enum(
    "part", ["decode", "augment", "plan", "step"], ["decode", "augment", "plan", "step"], "What."
)
_MARKDOWN = flags.DEFINE_string("markdown", None, "File to write the tables to as well.")

HEIGHT, WIDTH, PAD = 384, 128, 10
MEAN = np.array(augment.IMAGENET_MEAN, np.float32)
STD = np.array(augment.IMAGENET_STD, np.float32)
Rows = list[tuple[str, ...]]


def best(run: Callable[[], object], repeats: int) -> float:
    """Returns the seconds of the quickest of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_jpegs(count: int) -> list[bytes]:
    root = _ROOT.value or pathlib.Path(__file__).parents[1] / "tests" / "data" / "pedestrians"
    train = sources.load_dataset("folder", root).train
    files = [train.images.encoded(i) for i in range(len(train))]
    return [files[i % len(files)] for i in range(count)]


def make_split(files: list[bytes]) -> splits.Split:
    numbers = np.arange(len(files), dtype=np.int32)
    names = np.array([f"{i:07}.jpg" for i in numbers])
    return splits.Split(
        "train",
        names,
        numbers + 1,
        numbers,
        numbers,
        EncodedImages(files.__getitem__, len(files)),
        labels=numbers,
    )


def bench_decode(files: list[bytes]) -> Rows:
    split = make_split(files)
    load = functools.partial(
        store.load_store,
        split,
        height=HEIGHT,
        width=WIDTH,
        num_threads=_WORKERS.value,
        progress=False,
    )
    seconds = best(lambda: load(use_cache=False), _REPEATS.value)
    rows: Rows = [(f"decode into one array, {_WORKERS.value} threads", *speed(files, seconds))]
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        load(cache_dir=scratch)
        first = time.perf_counter() - start
        again = best(lambda: load(cache_dir=scratch), _REPEATS.value)
    rows.append(("first start: hash, decode, write the cache", *speed(files, first)))
    rows.append(("every later start: hash, map the cache", *speed(files, again)))
    return rows


def speed(items: list | np.ndarray, seconds: float) -> tuple[str, str]:
    return f"{len(items) / seconds:,.0f}", f"{1e3 * seconds:,.0f} ms for {len(items):,}"


def augment_by_pil(data: bytes) -> np.ndarray:
    """One training image as the transforms of PyTorch codes make it, channels first."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture = picture.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = ImageOps.expand(picture, PAD, fill=0)
    x, y = random.randint(0, 2 * PAD), random.randint(0, 2 * PAD)
    picture = picture.crop((x, y, x + WIDTH, y + HEIGHT))
    pixels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)).astype(np.float32) / 255
    pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    if random.random() < 0.5:
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * HEIGHT * WIDTH
            aspect = random.uniform(0.3, 1 / 0.3)
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < HEIGHT and wide < WIDTH:
                top, left = random.randint(0, HEIGHT - tall), random.randint(0, WIDTH - wide)
                pixels[:, top : top + tall, left : left + wide] = MEAN[:, None, None]
                break
    return pixels


def make_pil_batch(files: list[bytes]) -> np.ndarray:
    return np.stack([augment_by_pil(data) for data in files])


def make_shared_batch(files: list[bytes], name: str) -> None:
    """Leaves a batch in shared memory, as the workers of a PyTorch loader do."""
    block = shared_memory.SharedMemory(name)
    batch: np.ndarray = np.ndarray((len(files), 3, HEIGHT, WIDTH), np.float32, block.buf)
    for i, data in enumerate(files):
        batch[i] = augment_by_pil(data)
    del batch  # the block cannot be closed while an array looks at it
    block.close()


def bench_augment(files: list[bytes]) -> Rows:
    batch = files[: _BATCH.value]
    pixels = np.stack([decode_image(data).pixels for data in batch])
    keys = augment.example_keys(0, 0, np.arange(len(batch)))
    on_device = jnp.asarray(pixels)
    rows: Rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        run = jax.jit(
            functools.partial(augment.augment_batch, height=HEIGHT, width=WIDTH, dtype=dtype)
        )
        run(on_device, keys).block_until_ready()
        seconds = best(functools.partial(run, on_device, keys), 3 * _REPEATS.value)
        rows.append((f"ours, {jnp.dtype(dtype).name}, in the step", *speed(batch, seconds)))
    seconds = best(lambda: make_pil_batch(batch), _REPEATS.value)
    rows.append(("PIL and NumPy with JPEG decoding, 1 process", *speed(batch, seconds)))
    workers = _WORKERS.value
    blocks = [
        shared_memory.SharedMemory(create=True, size=4 * 3 * HEIGHT * WIDTH * len(batch))
        for _ in range(2 * workers)
    ]
    names = [block.name for block in blocks]
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:

        def run_pool() -> None:
            for _ in pool.map(make_shared_batch, [batch] * len(names), names):
                pass

        run_pool()
        seconds = best(run_pool, _REPEATS.value) / len(names)
    for block in blocks:
        block.close()
        block.unlink()
    rows.append((f"the same, {workers} worker processes", *speed(batch, seconds)))
    return rows


def bench_plan() -> Rows:
    rows: Rows = []
    rng = np.random.default_rng(0)
    market = np.repeat(np.arange(751), rng.multinomial(12_936 - 751 * 2, np.ones(751) / 751) + 2)
    big = np.repeat(np.arange(_BIG.value), rng.integers(1, 9, _BIG.value))
    for name, labels in (("Market-1501", market), (f"{_BIG.value:,} identities", big)):

        def plan(labels: np.ndarray = labels) -> np.ndarray:
            return batches.plan_epoch(labels, identities=32, images=4, seed=0, epoch=0)

        seconds = best(plan, _REPEATS.value)
        tracemalloc.start()
        steps = len(plan())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append(
            (name, f"{len(labels):,}", f"{steps:,}", f"{seconds:.4f}", f"{peak / 1e6:,.1f}")
        )
    return rows


def bench_step(files: list[bytes]) -> Rows:
    """Times forward and backward pass with the pictures ready, and with the data path before it."""
    from mros_jax import losses
    from mros_jax.systems.mros import MROS

    count, classes = _STEP_BATCH.value, 751
    model = MROS(num_classes=classes, backbone=_BACKBONE.value)
    pixels = np.stack([decode_image(data).pixels for data in files[: max(count, 256)]])
    data = jnp.asarray(pixels)
    ready = augment.preprocess(pixels[:count], height=HEIGHT, width=WIDTH)
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), ready, train=False)
    labels = jnp.arange(count) // 2
    outputs: Any = jax.eval_shape(lambda x: model.apply(variables, x, train=False), ready)
    centers = jnp.zeros((1, classes, outputs.descriptor.shape[-1]))

    def gradients(params, images):
        def loss(params):
            outputs, _ = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return losses.mros_loss(outputs, labels, centers, setting="IV")[0]

        return jax.grad(loss)(params)

    def with_data(params, indices, step):
        keys = augment.example_keys(0, step, jnp.arange(count))
        images = augment.augment_batch(data[indices], keys, height=HEIGHT, width=WIDTH)
        return gradients(params, images)

    plain, whole = jax.jit(gradients), jax.jit(with_data)
    data_alone = jax.jit(
        lambda indices, step: augment.augment_batch(
            data[indices],
            augment.example_keys(0, step, jnp.arange(count)),
            height=HEIGHT,
            width=WIDTH,
        )
    )
    indices = np.random.default_rng(0).integers(0, len(pixels), count).astype(np.int32)
    params = variables["params"]
    runs: dict[str, Callable[[], object]] = {
        "forward and backward, pictures ready": lambda: plain(params, ready),
        "the same with look-up, resize and augmentation": lambda: whole(params, indices, 1),
        "look-up, resize and augmentation alone": lambda: data_alone(indices, 1),
    }
    for run in runs.values():
        jax.block_until_ready(run())
    seconds = dict.fromkeys(runs, math.inf)
    for _ in range(_REPEATS.value):  # in turn, so that a noisy machine is noisy for all
        for name, run in runs.items():
            seconds[name] = min(seconds[name], best(run, 1))
    base = seconds["forward and backward, pictures ready"]
    return [
        (name, f"{1e3 * spent:,.1f}", f"{100 * (spent / base):.2f} %")
        for name, spent in seconds.items()
    ]


def format_table(title: str, header: tuple[str, ...], rows: Rows) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    files = read_jpegs(max(_IMAGES.value, _BATCH.value, _STEP_BATCH.value))
    sections = ["## Data", provenance.describe_machine("pillow") + "\n"]
    per_image: tuple[str, ...] = ("", "images/s", "time")
    header: tuple[str, ...]
    for part in dict.fromkeys(_PARTS.value):
        if part == "decode":
            title = "Decoding 128 x 64 JPEG"
            section = format_table(title, per_image, bench_decode(files[: _IMAGES.value]))
        elif part == "augment":
            title = f"Augmentation, 128 x 64 to {HEIGHT} x {WIDTH}, batch of {_BATCH.value}"
            section = format_table(title, per_image, bench_augment(files))
        elif part == "plan":
            header = ("epoch plan, P x K = 32 x 4", "images", "steps", "seconds", "peak MB")
            section = format_table("Epoch plan", header, bench_plan())
        else:
            title = f"Training step, {_BACKBONE.value}, batch of {_STEP_BATCH.value}, float32"
            header = ("", "ms", "of the step without data")
            section = format_table(title, header, bench_step(files))
        print(section, flush=True)
        sections.append(section)
    print(sections[1])
    if _MARKDOWN.value:
        out = pathlib.Path(_MARKDOWN.value)
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text("\n".join(sections))
        os.replace(temporary, out)


if __name__ == "__main__":
    app.run(main)

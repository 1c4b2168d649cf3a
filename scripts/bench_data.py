"""What the data path costs: decoding, augmentation, epoch plans, its share of steps and extraction.

    python -m scripts.bench_data --config configs/mros.py --part decode,augment,plan
    python -m scripts.bench_data --config configs/mros.py --config.batch.identities=2 --part step
    python -m scripts.bench_data --config configs/mros.py --images=512 --part extract

The images are JPEG files of 128 x 64 in memory: those of the tests, or the training images of a
directory in Market-1501's layout that `--root` names, repeated. The comparison augments image by
image with PIL and NumPy in worker processes that leave their batches in shared memory, which is
what torchreid's transforms amount to: decode, resize, flip, pad and crop, to float, normalize,
erase.
"""

import concurrent.futures
import contextlib
import functools
import io
import math
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Generator, Sequence, Sized
from multiprocessing import shared_memory
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from mros_jax import console, parallel
from mros_jax.config import make_network
from mros_jax.data import augment, batches, decoding, jpeg, splits, store
from mros_jax.data.datasets import sources
from mros_jax.data.images import EncodedImages
from mros_jax.inference import make_embedder
from mros_jax.training import recipe
from scripts import common

MEAN = np.array(augment.IMAGENET_MEAN, np.float32)
STD = np.array(augment.IMAGENET_STD, np.float32)
PARTS = ("decode", "augment", "plan", "step", "extract")
Rows = list[tuple[str, ...]]


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_jpegs(root: pathlib.Path, count: int) -> list[bytes]:
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


def bench_decode(config: ConfigDict, files: list[bytes], workers: int, repeats: int) -> Rows:
    load = functools.partial(
        store.load_store,
        make_split(files),
        **find_resize(config),
        num_threads=workers,
        progress=False,
    )
    rows: Rows = []
    decoders = ["Pillow"] if jpeg.find_decoder() is None else ["Pillow", "simplejpeg"]
    for decoder in decoders:
        with by_pillow() if decoder == "Pillow" else contextlib.nullcontext():
            seconds = best(lambda: load(use_cache=False), repeats)
        name = f"decode into one array, {workers} threads, {decoder}"
        rows.append((name, *speed(files, seconds)))
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        load(cache_dir=scratch)
        first = time.perf_counter() - start
        again = best(lambda: load(cache_dir=scratch), repeats)
    rows.append(("first start: hash, decode, write the cache", *speed(files, first)))
    rows.append(("every later start: hash, map the cache", *speed(files, again)))
    return rows


def find_resize(config: ConfigDict) -> dict[str, Any]:
    return {name: config.input[name] for name in ("height", "width", "interpolation")}


@contextlib.contextmanager
def by_pillow() -> Generator[None, None, None]:
    """Decode as where simplejpeg is not installed."""
    with mock.patch.object(jpeg, "decode_plain", return_value=None):
        yield


def speed(items: Sized, seconds: float) -> tuple[str, str]:
    return f"{len(items) / seconds:,.0f}", f"{1e3 * seconds:,.0f} ms for {len(items):,}"


def augment_by_pil(data: bytes, config: ConfigDict) -> np.ndarray:
    """One training image as the transforms of PyTorch codes make it, channels first."""
    height, width, pad = config.input.height, config.input.width, config.augment.pad
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = ImageOps.expand(picture, pad, fill=0)
    x, y = random.randint(0, 2 * pad), random.randint(0, 2 * pad)
    picture = picture.crop((x, y, x + width, y + height))
    pixels = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)).astype(np.float32) / 255
    pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    if random.random() < 0.5:
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * height * width
            aspect = random.uniform(0.3, 1 / 0.3)
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top, left = random.randint(0, height - tall), random.randint(0, width - wide)
                pixels[:, top : top + tall, left : left + wide] = MEAN[:, None, None]
                break
    return pixels


def make_pil_batch(files: list[bytes], config: ConfigDict) -> np.ndarray:
    return np.stack([augment_by_pil(data, config) for data in files])


def make_shared_batch(files: list[bytes], config: ConfigDict, name: str) -> None:
    """Leave a batch in shared memory, as the workers of a PyTorch loader do."""
    block = shared_memory.SharedMemory(name)
    shape = (len(files), 3, config.input.height, config.input.width)
    batch: np.ndarray = np.ndarray(shape, np.float32, block.buf)
    for i, data in enumerate(files):
        batch[i] = augment_by_pil(data, config)
    del batch  # the block cannot be closed while an array looks at it
    block.close()


def bench_augment(config: ConfigDict, batch: list[bytes], workers: int, repeats: int) -> Rows:
    pixels = jnp.asarray(np.stack([decoding.decode_image(data).pixels for data in batch]))
    keys = augment.example_keys(0, 0, np.arange(len(batch)))
    rows: Rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        run = jax.jit(functools.partial(recipe.make_augment(config), dtype=dtype))
        run(pixels, keys).block_until_ready()
        seconds = best(functools.partial(run, pixels, keys), 3 * repeats)
        rows.append((f"ours, {jnp.dtype(dtype).name}, in the step", *speed(batch, seconds)))
    seconds = best(lambda: make_pil_batch(batch, config), repeats)
    rows.append(("PIL and NumPy with JPEG decoding, 1 process", *speed(batch, seconds)))
    size = 4 * 3 * config.input.height * config.input.width * len(batch)
    blocks = [shared_memory.SharedMemory(create=True, size=size) for _ in range(2 * workers)]
    names = [block.name for block in blocks]
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:

        def run_pool() -> None:
            make = functools.partial(make_shared_batch, batch, config)
            for _ in pool.map(make, names):
                pass

        run_pool()
        seconds = best(run_pool, repeats) / len(names)
    for block in blocks:
        block.close()
        block.unlink()
    rows.append((f"the same, {workers} worker processes", *speed(batch, seconds)))
    return rows


def bench_plan(config: ConfigDict, big: int, repeats: int) -> Rows:
    rows: Rows = []
    sampler = batches.make_sampler(config.batch.to_dict())
    rng = np.random.default_rng(0)
    market = np.repeat(np.arange(751), rng.multinomial(12_936 - 751 * 2, np.ones(751) / 751) + 2)
    large = np.repeat(np.arange(big), rng.integers(1, 9, big))
    for name, labels in (("Market-1501", market), (f"{big:,} identities", large)):
        plan = functools.partial(sampler.plan, labels, np.zeros_like(labels), seed=0, epoch=0)
        seconds = best(plan, repeats)
        tracemalloc.start()
        steps = len(plan())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append(
            (name, f"{len(labels):,}", f"{steps:,}", f"{seconds:.4f}", f"{peak / 1e6:,.1f}")
        )
    return rows


def bench_step(config: ConfigDict, files: list[bytes], repeats: int) -> Rows:
    """Time the step that training runs, with pictures that are ready and with the data path."""
    sampler = batches.make_sampler(config.batch.to_dict())
    pixels = np.stack([decoding.decode_image(data).pixels for data in files])
    labels = (np.arange(len(files)) // 4).astype(np.int32)
    indices = sampler.plan(labels, np.zeros_like(labels), seed=config.seed, epoch=0)[0]
    devices = jax.devices()[:1]
    looked_up = parallel.split({"indices": indices}, devices)
    data = parallel.replicate({"images": pixels, "labels": labels}, devices)
    ready = np.asarray(augment.preprocess(pixels[indices], **config.input.to_dict()))
    num_classes = max(751, int(labels[-1]) + 1)
    augment_batch = recipe.make_augment(config)

    @jax.jit
    def look_up(images: jax.Array, indices: np.ndarray) -> jax.Array:
        keys = augment.example_keys(config.seed, 1, jnp.arange(sampler.size))
        return augment_batch(images[indices], keys)

    plain = "training step, pictures ready"
    runs: dict[str, Callable[[], object]] = {
        plain: common.Step(
            config,
            num_classes,
            None,
            parallel.split({"images": ready, "labels": labels[indices]}, devices),
            augment_batch=common.keep_images,
            devices=devices,
        ),
        "the same with look-up, resize and augmentation": common.Step(
            config, num_classes, data, looked_up, devices=devices
        ),
        "look-up, resize and augmentation alone": lambda: look_up(data["images"], indices),
    }
    for run in runs.values():
        jax.block_until_ready(run())
    seconds = dict.fromkeys(runs, math.inf)
    for _ in range(repeats):  # in turn, so that a noisy machine is noisy for all
        for name, run in runs.items():
            seconds[name] = min(seconds[name], best(run, 1))
    return [
        (name, f"{1e3 * spent:,.1f}", f"{100 * (spent / seconds[plain]):.2f} %")
        for name, spent in seconds.items()
    ]


def bench_extract(config: ConfigDict, files: list[bytes], repeats: int) -> Rows:
    """Time descriptors of files, and what of the decoding the network does not hide."""
    network: Any = make_network(config, 751)
    height, width = config.input.height, config.input.width
    image = jnp.zeros((1, height, width, 3))
    variables = network.init(jax.random.key(0), image, train=False)
    embedder = make_embedder(config, network, variables)

    def load(paths: Sequence[pathlib.Path]) -> np.ndarray:
        return decoding.load_images(paths, **find_resize(config))

    with tempfile.TemporaryDirectory() as scratch:
        paths = [pathlib.Path(scratch) / f"{i}.jpg" for i in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        pixels = load(paths)
        embed = functools.partial(embedder.embed, fill=True)
        embed(pixels[:1])
        runs: dict[str, Callable[[], object]] = {
            "the network alone": lambda: embed(pixels),
            "read, decode and resize alone": lambda: load(paths),
            "from files": lambda: embed(paths),
        }
        seconds = dict.fromkeys(runs, math.inf)
        for _ in range(repeats):  # in turn, so that a noisy machine is noisy for all
            for name, run in runs.items():
                seconds[name] = min(seconds[name], best(run, 1))
    alone, decoding_alone, both = seconds.values()
    hidden = (alone + decoding_alone - both) / decoding_alone
    rows: Rows = [(name, *speed(files, spent)) for name, spent in seconds.items()]
    return [*rows, ("of the decoding hidden behind the network", "", f"{100 * hidden:.0f} %")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument(
        "--root",
        type=pathlib.Path,
        default=common.ROOT / "tests" / "data" / "pedestrians",
        help="directory in Market-1501's layout (default: that of the tests)",
    )
    common.add_part(parser, PARTS)
    parser.add_argument("--images", type=console.count, default=12_936, help="images to decode")
    parser.add_argument(
        "--workers", type=console.count, default=os.cpu_count() or 1, help="threads and processes"
    )
    parser.add_argument(
        "--big", type=console.count, default=1_000_000, help="identities in the large epoch plan"
    )
    common.add_repeats(parser, 5)
    common.add_markdown(parser)
    config, args = common.parse_with_config(parser, argv)
    size = batches.make_sampler(config.batch.to_dict()).size
    num_step = max(256, 4 * size)
    files = read_jpegs(args.root, max(args.images, num_step))
    per_image: tuple[str, ...] = ("", "images/s", "time")
    what = common.describe_config(config)
    sections = [f"{what}; {common.describe_machine('pillow')}"]
    for part in args.part:
        print(part, file=sys.stderr)
        if part == "decode":
            rows = bench_decode(config, files[: args.images], args.workers, args.repeats)
            title, header = "Decoding 128 x 64 JPEG", per_image
        elif part == "augment":
            rows = bench_augment(config, files[:size], args.workers, args.repeats)
            title, header = "Augmentation of 128 x 64 pixels", per_image
        elif part == "plan":
            rows = bench_plan(config, args.big, args.repeats)
            title, header = "Epoch plan", ("", "images", "steps", "seconds", "peak MB")
        elif part == "step":
            rows = bench_step(config, files[:num_step], args.repeats)
            title, header = "Training step", ("", "ms", "of the step without data")
        else:
            rows = bench_extract(config, files[: args.images], args.repeats)
            title, header = "Extraction from JPEG files", per_image
        sections.append(f"### {title}\n\n{common.format_table(header, rows)}")
    common.publish("\n\n".join(sections), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

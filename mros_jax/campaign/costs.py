"""What systems cost: sizes, speed and memory, measured apart from their training.

Each is measured in a process of its own, which leaves nothing behind and whose peak is its own.
"""

import dataclasses
import itertools
import logging
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import jax
import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, parallel
from mros_jax.campaign.systems import System
from mros_jax.data.splits import Dataset
from mros_jax.errors import UserError
from mros_jax.files import read_json, write_json
from mros_jax.inference import Embedder, make_embedder
from mros_jax.retrieval import descriptors, evaluate
from mros_jax.runs.provenance import get_commit
from mros_jax.training import recipe
from mros_jax.training.feed import Feed
from mros_jax.training.state import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a system costs on a device.

    Attributes:
        words: of the config that was measured.
        parameters: numbers to learn in the network.
        multiply_adds: of one pass for the descriptor, see `mros_jax.models.counting`.
        passes: of one image at test: 2 with the flip test, 10 with ten crops.
        descriptor: its size.
        batch: images of a training step.
        steps: of the run.
        step_seconds: of a training step; with several stages the mean over the run.
        extract_seconds: of an image's descriptor, all passes.
        rank_seconds: of ranking the whole gallery for all queries, without re-ranking.
        start_seconds: from the start of the process to its first step, compiling included.
        evaluations: of the run.
        test_images: queries and gallery.
        host_bytes: peak memory of the process.
        device_bytes: peak memory of the device, where it tells.
        device: what computed.
        load: of the machine when it was measured: processes that wanted to run.
        commit: of this project.
    """

    words: tuple[str, ...]
    parameters: int
    multiply_adds: int
    passes: int
    descriptor: int
    batch: int
    steps: int
    step_seconds: float
    extract_seconds: float
    rank_seconds: float
    start_seconds: float
    evaluations: int
    test_images: int
    host_bytes: int
    device_bytes: int | None
    device: str
    load: float
    commit: str | None

    @property
    def train_speed(self) -> float:
        """Images of training steps a second."""
        return self.batch / self.step_seconds

    @property
    def extract_speed(self) -> float:
        """Images a second whose descriptors are computed."""
        return 1 / self.extract_seconds

    @property
    def evaluate_seconds(self) -> float:
        """Of one evaluation of the run's test images, without re-ranking."""
        return self.test_images * self.extract_seconds + self.rank_seconds

    @property
    def run_seconds(self) -> float:
        """Of a whole run, as these figures foretell it, without its re-ranking."""
        return (
            self.start_seconds
            + self.steps * self.step_seconds
            + self.evaluations * self.evaluate_seconds
        )


def measure(words: Sequence[str], repeats: int, asked: float) -> Cost:
    """Measure a system in this process, on its own data and with random weights.

    Args:
        words: `--config` and its changes.
        repeats: timed steps, and timed batches at test; the median counts.
        asked: when it was asked for, of `time.time()`: the process has started since.

    Raises:
        UserError: the config fits neither itself, the data nor the devices.
    """
    parallel.use_compilation_cache()
    config, _ = configs.parse_config(words)
    assert config is not None
    config.weights = "none"  # they take no other time
    recipe.check_config(config)
    dataset = configs.load_dataset(config)
    recipe.check_fit(config, dataset)
    feed = Feed(config, dataset)
    sizes = feed.sizes
    parts = recipe.build(config, dataset.num_classes, sizes.steps_per_epoch)
    timed = [_time_steps(stage, parts.state, feed, repeats) for stage in parts.stages]
    ready = time.time()
    weights = [stage.end - stage.start for stage in parts.stages]
    step_seconds = sum(w * t for w, t in zip(weights, timed, strict=True)) / sum(weights)

    embedder = make_embedder(config, parts.network, jax.device_get(parts.state.eval_variables))
    images = np.asarray(configs.load_images(config, dataset.query, progress=False).images)
    extract_seconds = _time_extraction(embedder, images[: config.eval.batch_size], config, repeats)
    size = embedder.descriptor_sizes["descriptor"]
    rank_seconds = _time_ranking(dataset, size, config)
    told = jax.local_devices()[0].memory_stats() or {}
    return Cost(
        words=tuple(words),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(parts.state.params["network"])),
        multiply_adds=embedder.count_multiply_adds()["descriptor"],
        passes=count_passes(config.eval.flip_test, config.eval.crops),
        descriptor=size,
        batch=sizes.batch,
        steps=sizes.total_steps,
        step_seconds=step_seconds,
        extract_seconds=extract_seconds,
        rank_seconds=rank_seconds,
        start_seconds=ready - asked - repeats * sum(timed),
        evaluations=-(-sizes.total_steps // (sizes.steps_per_epoch * config.eval.every_epochs)),
        test_images=len(dataset.query) + len(dataset.gallery),
        host_bytes=_read_peak(),
        device_bytes=told.get("peak_bytes_in_use"),
        device=parallel.describe_devices(),
        load=os.getloadavg()[0],
        commit=get_commit(),
    )


def count_passes(flip_test: bool, crops: str) -> int:
    """Passes of one image at test."""
    return 10 if crops == "ten" else 1 + flip_test


def _time_steps(stage: recipe.Stage, state: TrainState, feed: Feed, repeats: int) -> float:
    """Median seconds of a stage's training steps, data path included."""
    step = parallel.MappedStep(stage.step)
    placed = parallel.replicate(stage.begin(state))
    batches = itertools.chain.from_iterable(map(feed.epoch, itertools.count()))
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        since = time.perf_counter()
        placed, metrics = step(placed, feed.data, next(batches))
        jax.block_until_ready((placed, metrics))
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[1:])


def _time_extraction(
    embedder: Embedder, images: np.ndarray, config: ConfigDict, repeats: int
) -> float:
    """Median seconds of an image's descriptor, tested as the config says."""
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        since = time.perf_counter()
        embedder.embed_all(
            images,
            batch_size=config.eval.batch_size,
            flip_test=config.eval.flip_test,
            crops=config.eval.crops,
        )
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[1:]) / len(images)


def _time_ranking(dataset: Dataset, size: int, config: ConfigDict) -> float:
    """Seconds of ranking drawn descriptors of a size for all queries, without re-ranking."""
    rng = np.random.default_rng(0)
    features: dict[str, np.ndarray] = {}
    for split in (dataset.query, dataset.gallery):
        drawn = rng.standard_normal((len(split), size), np.float32)
        features |= {f"{split.name}_features": drawn}
        features |= {f"{split.name}_pids": split.pids, f"{split.name}_camids": split.camids}
    since = time.perf_counter()
    evaluate(
        *(features[name] for name in descriptors.ARRAYS),
        metric=config.eval.metric,
        normalize=config.eval.normalize,
    )
    return time.perf_counter() - since


def _read_peak() -> int:
    """Peak memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be at least that of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_apart(words: Sequence[str], repeats: int) -> Cost:
    """Measure a system in a process of its own, which ends where this one is stopped.

    Raises:
        UserError: it could not be measured; says why.
    """
    start = multiprocessing.get_context("spawn")
    receiving, sending = start.Pipe(duplex=False)
    process = start.Process(target=_answer, args=(sending, words, repeats, time.time()))
    process.start()
    sending.close()  # of this process
    try:
        answer = receiving.recv()
    except EOFError:
        answer = "its process was killed, as systems do where memory is short"
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        receiving.close()
    if not isinstance(answer, Cost):
        raise UserError(str(answer))
    return answer


def _answer(sending: Connection, words: Sequence[str], repeats: int, asked: float) -> None:
    """Send what `measure` returns, or why it cannot, to the process that asks."""
    console.show_messages()
    try:
        sending.send(measure(words, repeats, asked))
    except Exception as error:  # of any kind, XLA's own too: the process that asks goes on
        why = console.explain(error)
        if why is None:
            log.exception("%s could not be measured", " ".join(words))
            why = f"{type(error).__name__}: {error}"
        sending.send(why)


def load_cost(system: System, folder: pathlib.Path) -> Cost | None:
    """What a system costs as measured before; None where it was not, or with another config."""
    path = _find(system, folder)
    if not path.exists():
        return None
    try:
        read = read_json(path)
        cost = Cost(**{**read, "words": tuple(read["words"])})
    except (KeyError, TypeError, UserError) as error:
        log.warning("%s is not used, measure again: %s", path, error)
        return None
    return cost if cost.words == system.words else None


def measure_all(
    systems: Sequence[System],
    folder: pathlib.Path,
    repeats: int,
    *,
    again: bool = True,
) -> dict[str, str]:
    """Measure systems one after another and keep what each costs in `costs/NAME.json`.

    Args:
        systems: to measure.
        folder: of the campaign.
        repeats: see `measure`.
        again: also those that were measured before.

    Returns:
        Name -> why it could not be measured, of those that could not.
    """
    failures = {}
    (folder / "costs").mkdir(parents=True, exist_ok=True)
    for system in systems:
        if not again and load_cost(system, folder) is not None:
            continue
        log.info("Measuring %s", system.name)
        try:
            cost = measure_apart(system.words, repeats)
        except UserError as error:
            failures[system.name] = str(error)
            log.warning("%s could not be measured: %s", system.name, failures[system.name])
            continue
        write_json(_find(system, folder), dataclasses.asdict(cost))
    return failures


def _find(system: System, folder: pathlib.Path) -> pathlib.Path:
    return folder / "costs" / f"{system.name}.json"

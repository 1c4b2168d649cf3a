"""Trains a model from a config: `python -m mros_jax.train --config configs/mros.py`.

The run resumes exactly: started again with the same config and workdir it goes on from the last
checkpoint, and ends in the same parameters and logs as if it had never been interrupted.
"""

import contextlib
import json
import logging
import os
import pathlib
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from mros_jax import config as configs
from mros_jax import console, parallel, report
from mros_jax.data.datasets import sources
from mros_jax.files import write_json
from mros_jax.runs import provenance
from mros_jax.runs.logs import Writer
from mros_jax.training import checkpoints, feed, recipe, validation
from mros_jax.training.loop import Logger, Stop, claim_workdir

log = logging.getLogger("mros_jax.train")  # also where this file is __main__

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run. Default: runs/NAME-DATASET-seedSEED."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a run of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any] | None:
    """Trains, evaluates and reports; resumes where a former call was stopped.

    Args:
        config: of `configs/mros.py`'s shape.
        workdir: the run's directory, made where missing.

    Returns:
        The content of `results.json`; None where SIGINT or SIGTERM stopped the run early with its
        state saved, and in processes other than the first.

    Raises:
        ValueError: a config that fits neither itself, the data nor the devices; a workdir of
            another config.
        FloatingPointError: the loss became NaN or infinite.
    """
    workdir = pathlib.Path(workdir).absolute()
    is_main = parallel.is_main_process()
    recipe.check_config(config)
    dataset = configs.load_dataset(config)
    recipe.check_fit(config, dataset)
    batches = feed.Feed(config, dataset)
    sizes = batches.sizes
    parts = recipe.build(config, dataset.num_classes, sizes.steps_per_epoch)
    if is_main:
        claim_workdir(workdir, config)
        write_json(workdir / "run.json", describe_run(dataset, workdir / "run.json"))
    state, mapped_step = parts.state, parallel.MappedStep(parts.step)
    saved = checkpoints.Checkpoints(workdir / "checkpoints")
    best_mAP, last_saved = -1.0, None
    if (restored := saved.restore(state)) is not None:
        state, extra = restored
        best_mAP, last_saved = extra.get("best_mAP", best_mAP), int(state.step)
        log.info("Going on after step %d of %d", last_saved, sizes.total_steps)
    step = int(state.step)
    state = parallel.replicate(state)
    evaluator = validation.Evaluator(config, dataset, parts.network)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        stack.callback(saved.close)
        writer = Writer(workdir, start_step=step) if is_main else None
        if writer:
            stack.callback(writer.close)
        bar = tqdm(total=sizes.total_steps, initial=step, desc="training", disable=not is_main)
        logger = Logger(writer, stack.enter_context(bar), sizes)
        while step < sizes.total_steps:
            epoch, first = divmod(step, sizes.steps_per_epoch)
            for batch in batches.epoch(epoch, first):
                with jax.transfer_guard_device_to_host("disallow"):
                    state, metrics = mapped_step(state, batches.data, batch)
                step += 1
                logger.add(step, metrics)
                at_log_point = step % config.log_every_steps == 0
                if at_log_point:
                    logger.flush(last_saved)
                if stop.poll(at_log_point):
                    break
            logger.flush(last_saved)

            # Evaluate, then save: a checkpoint is a completed step with all its logs on disk.
            epochs_done, rest = divmod(step, sizes.steps_per_epoch)
            finished = step == sizes.total_steps
            evaluating = finished or (rest == 0 and epochs_done % config.eval.every_epochs == 0)
            names = ["last"]
            if evaluating:
                scores = evaluator.run(state, epochs_done, workdir if finished else None)
                if scores["mAP"] > best_mAP:
                    best_mAP = scores["mAP"]
                    names = ["best", "last"]
                if writer:
                    writer.metrics("eval", {"step": step, "epoch": epoch, **scores})
                    writer.flush()
            if (
                evaluating
                or stop.agreed
                or (rest == 0 and epochs_done % config.checkpoint_every_epochs == 0)
            ):
                for name in names:
                    saved.save(state, {"best_mAP": best_mAP}, name)
                last_saved = step
            if stop.agreed and not finished:
                log.info("Stopped after step %d; the same command goes on from there", step)
                return None
            logger.restart_clock()
    if not is_main:
        return None
    if config.report:
        log.info("Report: %s", report.write_report(workdir))
    return json.loads((workdir / "results.json").read_text())


def describe_run(dataset: sources.Dataset, former: pathlib.Path | None = None) -> dict[str, Any]:
    """What `run.json` says: provenance, sizes of the data set, and how it was started before."""
    earlier = []
    if former is not None and former.exists():
        before = json.loads(former.read_text())
        start = {key: before[key] for key in ("command", "commit", "started")}
        earlier = [*before["earlier_starts"], start]
    return {
        **provenance.describe(),
        "dataset": {
            "name": dataset.name,
            "num_classes": dataset.num_classes,
            **{f"num_{split.name}": len(split) for split in dataset.splits},
        },
        "earlier_starts": earlier,
    }


def main(argv: list[str]) -> None:
    """Command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    console.show_messages()
    parallel.use_compilation_cache()
    parallel.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config = _CONFIG.value
    default = f"runs/{config.name}-{config.dataset.name}-seed{config.seed}"
    try:
        train(config, _WORKDIR.value or default)
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        log.debug("Traceback", exc_info=error)
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)

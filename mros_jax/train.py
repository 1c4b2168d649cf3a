"""Train a model from a config: `python -m mros_jax.train --config configs/mros.py`.

The run resumes exactly: started again with the same config and workdir it goes on from the last
checkpoint, and ends in the same parameters and logs as if it had never been interrupted.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console, extras, parallel, report
from mros_jax.errors import NotFoundError
from mros_jax.runs import checkpoints, features, provenance
from mros_jax.runs.logs import Writer
from mros_jax.runs.run import Run
from mros_jax.training import feed, recipe, validation
from mros_jax.training.loop import Logger, Stop
from mros_jax.training.source import load_source

log = logging.getLogger("mros_jax.train")  # also where this file is __main__


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Train, evaluate and report; resume where a former call was stopped.

    Everything is checked before anything is written.

    Args:
        config: of `configs/mros.py`'s shape.
        workdir: the run's directory, made where missing.

    Returns:
        The content of `results.json`; None where SIGINT or SIGTERM stopped the run early with its
        state saved, and in processes other than the first.

    Raises:
        UserError: a config that fits neither itself, the data nor the devices; a workdir of another
            config, of other data or in use.
        DivergedError: the loss became NaN or infinite.
    """
    run = Run(os.path.abspath(workdir))
    log.info("Devices: %s", parallel.describe_devices())
    no_report = extras.find_missing("report", "The report at the end")
    if config.report and no_report:
        log.warning("%s; then: python -m mros_jax.report %s", no_report, run.path)
    parallel.run_on_main(lambda: run.check_free(config))
    recipe.check_config(config)
    begun = parallel.agree(parallel.is_main_process() and checkpoints.exists(run.checkpoints))
    source = parallel.run_on_all(lambda: None if begun else load_source(config.init))
    dataset = parallel.run_on_all(lambda: configs.load_dataset(config))
    recipe.check_fit(config, dataset)
    batches = feed.Feed(config, dataset)
    steps = batches.sizes.steps_per_epoch
    parts = parallel.run_on_all(
        lambda: recipe.build(config, dataset.num_classes, steps, source=source)
    )
    evaluator = validation.Evaluator(config, dataset, parts.network)
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            record = provenance.describe_run(
                dataset, features.fingerprint(dataset), init=source.describe() if source else None
            )
            stack.enter_context(run.claim(config, record))

        parallel.run_on_main(claim)
        saved = checkpoints.Checkpoints(run.checkpoints)
        stack.callback(saved.close)
        loop = Loop(config, run, batches, evaluator, saved, parts)
        finished = loop.run()
    if not finished or not parallel.is_main_process():
        return None
    if config.report and not no_report:
        log.info("Report: %s", report.write_report(run.path))
    return Run(run.path).results


class Loop:
    """The steps of a run, from its last checkpoint to its end.

    A checkpoint is a completed step with the metrics of all steps up to it on disk. It is saved
    before it is evaluated, so that an evaluation that fails loses nothing; a resumed run that finds
    a state saved and not evaluated begins with its evaluation.

    Args:
        config: of the run.
        run: its directory.
        batches: what the steps are fed.
        evaluator: scores states.
        saved: the run's checkpoints.
        parts: the state before the first step, and the stages.
    """

    def __init__(
        self,
        config: ConfigDict,
        run: Run,
        batches: feed.Feed,
        evaluator: validation.Evaluator,
        saved: checkpoints.Checkpoints,
        parts: recipe.Recipe,
    ):
        self._config, self._run = config, run
        self._batches, self._sizes = batches, batches.sizes
        self._evaluator, self._saved = evaluator, saved
        self._parts = parts
        self._mapped_steps = [parallel.MappedStep(stage.step) for stage in parts.stages]
        restored = saved.restore(lambda step: parts.stage_at(step).begin(parts.state))
        self._last_saved = None if restored is None else int(restored.step)
        state = parts.state if restored is None else restored
        self._step = int(state.step)
        self._state = parallel.replicate(state)
        self._best_mAP = -1.0
        if self._last_saved is not None:
            log.info("Going on after step %d of %d", self._step, self._sizes.total_steps)
        self._announce(parts.stage_at(self._step))

    def run(self) -> bool:
        """Take all steps that are left; returns whether the run came to its end."""
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(Stop())
            evaluated = self._recall_evaluations()
            self._writer = None
            if parallel.is_main_process():
                self._writer = Writer(self._run, self._step, keep_evaluation=evaluated)
                stack.callback(self._writer.close)
            bar = console.progress(
                total=self._sizes.total_steps,
                initial=self._step,
                desc="training",
                disable=not parallel.is_main_process(),
            )
            logger = Logger(self._writer, stack.enter_context(bar), self._sizes)
            if self._last_saved is not None and self._is_due() and not evaluated:
                self._evaluate()
            while self._step < self._sizes.total_steps:
                self._train_epoch(logger, stop)
                epochs_done, rest = divmod(self._step, self._sizes.steps_per_epoch)
                due = rest == 0 and epochs_done % self._config.checkpoint_every_epochs == 0
                if due or stop.agreed or self._is_due():
                    parallel.run_on_main(lambda: self._saved.save(self._state))
                    self._last_saved = self._step
                if self._is_due() and not stop.agreed:
                    self._evaluate()
                if stop.agreed:
                    log.info(
                        "Stopped after step %d; the same command goes on from there", self._step
                    )
                    return False
                logger.restart_clock()
        return True

    def _train_epoch(self, logger: Logger, stop: Stop) -> None:
        """Steps up to the end of the epoch, or to where the run is stopped."""
        epoch, first = divmod(self._step, self._sizes.steps_per_epoch)
        stage = self._parts.stage_at(self._step)
        mapped_step = self._mapped_steps[self._parts.stages.index(stage)]
        for batch in self._batches.epoch(epoch, first):
            with jax.transfer_guard_device_to_host("disallow"):
                self._state, metrics = mapped_step(self._state, self._batches.data, batch)
            self._step += 1
            logger.add(self._step, metrics)
            at_log_point = self._step % self._config.log_every_steps == 0
            if at_log_point:
                logger.flush(self._last_saved)
            if stop.poll(at_log_point):
                break
        logger.flush(self._last_saved)
        following = self._parts.stage_at(self._step)
        if following is not stage:
            self._announce(following)
            self._state = parallel.replicate(following.begin(jax.device_get(self._state)))

    def _announce(self, stage: recipe.Stage) -> None:
        if stage.name:
            epochs = [step // self._sizes.steps_per_epoch for step in (stage.start, stage.end)]
            log.info("Stage %s, from epoch %d to %d", stage.name, *epochs)

    def _is_due(self) -> bool:
        """Whether the present step is one that is evaluated."""
        epochs_done, rest = divmod(self._step, self._sizes.steps_per_epoch)
        on_schedule = rest == 0 and epochs_done % self._config.eval.every_epochs == 0
        return self._step == self._sizes.total_steps or (on_schedule and self._step > 0)

    def _evaluate(self) -> None:
        """Evaluate the present state, log it, and keep it if it is the best."""
        epochs_done = self._step // self._sizes.steps_per_epoch
        if self._step == self._sizes.total_steps:
            scores = self._evaluator.finish(self._state, epochs_done, self._run)
        else:
            scores = self._evaluator.score(self._state, epochs_done)
        if self._writer:
            self._writer.metrics("eval", {"step": self._step, "epoch": epochs_done, **scores})
            self._writer.flush()

        def keep_best() -> None:
            if scores["mAP"] > self._best_mAP:
                self._best_mAP = scores["mAP"]
                self._saved.save(self._state, "best")

        parallel.run_on_main(keep_best)

    def _recall_evaluations(self) -> bool:
        """Find the best score before this step; returns whether this step's evaluation is whole."""
        evaluated = False
        if parallel.is_main_process():
            scores = {
                r["step"]: r["mAP"] for r in self._run.eval_records if r["step"] <= self._step
            }
            best = max(scores, key=scores.__getitem__, default=None)
            evaluated = self._step in scores
            evaluated &= best != self._step or self._saved.step("best") == best
            if self._step == self._sizes.total_steps:
                evaluated &= self._run.results_file.is_file()
            if not evaluated:
                scores.pop(self._step, None)
            self._best_mAP = max(scores.values(), default=-1.0)
        return parallel.agree(evaluated)


def _parse(argv: Sequence[str] | None) -> tuple[ConfigDict, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.train",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="--config.FIELD=VALUE sets a field of the config, as in --config.num_epochs=60",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="config file (required)")
    parser.add_argument(
        "--workdir", help="directory of the run (default: runs/NAME-DATASET-seedSEED)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="only go on with a run that the workdir holds"
    )
    parallel.add_arguments(parser)
    config, rest = configs.parse_config(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(rest)
    if config is None:
        parser.error("give --config FILE, such as configs/mros.py or configs/demo.py")
    return config, args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config, args = _parse(argv)
    default = f"runs/{config.name}-{config.dataset.name}-seed{config.seed}"
    workdir = args.workdir or default
    if args.resume and not Run(workdir).exists():
        raise NotFoundError(f"--resume: {workdir} holds no run; without --resume one is started")
    parallel.use_compilation_cache()
    parallel.initialize(args.coordinator_address, args.num_processes, args.process_id)
    train(config, workdir)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

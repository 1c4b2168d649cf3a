"""Checkpoints of a run: the last one, to resume from, and the best one, both committed atomically.

A checkpoint has the items `model` (the variables to evaluate with), `training` (the whole state, to
resume from) and `extra` (JSON). Arrays are saved whole, without a device axis, by process 0.
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mros_jax import parallel
from mros_jax.training.state import TrainState


def _make_manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    # Only process 0 writes, so only process 0 may take part in orbax's barriers.
    if jax.process_count() > 1:
        processes = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix=directory.name
        )
        directory.mkdir(parents=True, exist_ok=True)
    else:
        processes = ocp.options.MultiprocessingOptions()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1,
        create=jax.process_count() == 1,
        cleanup_tmp_directories=True,
        multiprocessing_options=processes,
    )
    return ocp.CheckpointManager(directory, options=options)


class Checkpoints:
    """The checkpoints below `directory`: `last/STEP` and `best/STEP`."""

    def __init__(self, directory: str | os.PathLike):
        directory = pathlib.Path(directory).absolute()
        self._managers = (
            {name: _make_manager(directory / name) for name in ("last", "best")}
            if parallel.is_main_process()
            else {}
        )

    def last_step(self) -> int | None:
        """The step of the last complete checkpoint, or None where there is none."""
        if not self._managers:
            return None
        return self._managers["last"].latest_step()

    def save(self, state: TrainState, extra: dict[str, Any], name: str = "last") -> None:
        """Saves `state` and the JSON-able `extra` as checkpoint `name`; replaces the one before.

        Returns once the arrays are copied; writing goes on in the background, and the former
        checkpoint is removed only after the new one is complete.
        """
        if not self._managers:
            return
        manager = self._managers[name]
        step = int(state.step)
        if step in manager.all_steps():
            return
        state = jax.tree.map(np.asarray, jax.device_get(state))
        manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(state.eval_variables),
                training=ocp.args.StandardSave(state),
                extra=ocp.args.JsonSave(extra),
            ),
            force=True,
        )

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The last complete checkpoint and its `extra`, or None where there is none.

        Process 0 reads; the others are sent the state (their `extra` is empty). A best checkpoint
        from after the last one is dropped: the resumed run will come to it again.

        Args:
            template: a state of the same structure, shapes and types.
        """
        last = self.last_step()
        step = int(parallel.broadcast(np.asarray(-1 if last is None else last)))
        if step < 0:
            return None
        state, extra = template, {}
        if self._managers:
            restored = self._managers["last"].restore(
                step,
                args=ocp.args.Composite(
                    training=ocp.args.StandardRestore(template), extra=ocp.args.JsonRestore()
                ),
            )
            state, extra = restored.training, restored.extra
            for late in self._managers["best"].all_steps():
                if late > step:
                    self._managers["best"].delete(late)
        return parallel.broadcast(state), extra

    def close(self) -> None:
        """Waits for pending writes and releases the directory."""
        for manager in self._managers.values():
            manager.close()


def load_variables(directory: str | os.PathLike, name: str = "last") -> tuple[dict[str, Any], int]:
    """The model's variables in a run's checkpoint, as NumPy arrays, and its step.

    Args:
        directory: the run's `checkpoints` directory.
        name: "last" or "best".

    Raises:
        FileNotFoundError: there is no complete checkpoint of that name.
    """
    directory = pathlib.Path(directory).absolute() / name
    step = None
    if directory.is_dir():
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(directory, options=options) as manager:
            step = manager.latest_step()
            if step is not None:
                restored = manager.restore(
                    step, args=ocp.args.Composite(model=ocp.args.StandardRestore())
                )
    if step is None:
        raise FileNotFoundError(f"no complete checkpoint below {directory}")
    return restored.model, step

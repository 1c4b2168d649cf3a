"""Checkpoints of a run: the last one, to resume from, and the best one, both whole or not there.

Each has the items `model` (the variables to evaluate with) and `extra` (JSON: digests of the
arrays); the last one also has `training` (the whole state). Arrays are saved without a device axis,
by process 0.
"""

import errno
import functools
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from mros_jax import console, parallel
from mros_jax.errors import NotFoundError, UserError

NAMES = ("last", "best")


@runtime_checkable
class State(Protocol):
    """What a checkpoint holds: a pytree that knows its step and what a model is evaluated with."""

    @property
    def step(self) -> Any:
        """Completed training steps."""
        ...

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables to evaluate with."""
        ...


S = TypeVar("S", bound=State)


def _load_orbax() -> Any:
    """Import orbax where it is first needed: it takes a while."""
    import orbax.checkpoint

    return orbax.checkpoint


def _work_alone(directory: pathlib.Path) -> Any:
    """Let this process take part in orbax's barriers alone."""
    ocp = _load_orbax()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{directory.name}-{me}"
    )


def _make_manager(directory: pathlib.Path) -> Any:
    ocp = _load_orbax()
    if jax.process_count() > 1:
        directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1,
        create=jax.process_count() == 1,
        cleanup_tmp_directories=True,
        # A disk that is full is met here, by the step that is being saved.
        enable_async_checkpointing=False,
        multiprocessing_options=_work_alone(directory),
    )
    return ocp.CheckpointManager(directory, options=options)


class Checkpoints:
    """The checkpoints below `directory`: `last/STEP` and `best/STEP`."""

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = pathlib.Path(directory).absolute()

    @functools.cached_property
    def _managers(self) -> dict[str, Any]:
        """orbax's, of the process that reads and writes."""
        return {name: _make_manager(self._directory / name) for name in NAMES}

    def step(self, name: str = "last") -> int | None:
        """The step of a complete checkpoint; None where there is none, and in other processes."""
        steps = _list_steps(self._directory / name) if parallel.is_main_process() else []
        return max(steps, default=None)

    def save(self, state: State, name: str = "last") -> None:
        """Save a state as checkpoint `name`, for "best" only its model.

        Returns when it is on disk; the former one is removed only then.
        """
        if not parallel.is_main_process():
            return
        step = int(state.step)
        if step in self._managers[name].all_steps():
            return
        state = jax.tree.map(np.asarray, jax.device_get(state))
        items = {"model": state.eval_variables} | ({"training": state} if name == "last" else {})
        self._write(name, step, items)

    def save_model(self, variables: dict[str, Any]) -> None:
        """Save a network that was trained elsewhere as "last", of step 0; no run goes on from it.

        Args:
            variables: parameters and statistics, NumPy arrays.
        """
        self._write("last", 0, {"model": variables})

    def _write(self, name: str, step: int, items: dict[str, Any]) -> None:
        ocp, manager = _load_orbax(), self._managers[name]
        digests = {item: digest(value) for item, value in items.items()}
        arguments = {item: ocp.args.StandardSave(value) for item, value in items.items()}
        try:
            manager.save(
                step,
                args=ocp.args.Composite(**arguments, extra=ocp.args.JsonSave(digests)),
                force=True,
            )
        except Exception as error:
            self._remove_torn(name, step)
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
            free = shutil.disk_usage(self._directory).free
            # Of writes side by side orbax raises any one's error: on a full disk at times that a
            # file, which went with the write that failed first, is not there.
            if free < needed and console.explain(error) is None:
                number = errno.ENOSPC
                raise OSError(number, os.strerror(number), str(self._directory)) from error
            raise

    def _remove_torn(self, name: str, step: int) -> None:
        """Remove what a save that failed has left; orbax's threads may still be writing there."""
        for _ in range(20):
            torn = list((self._directory / name).glob(f"{step}.orbax-checkpoint-tmp*"))
            if not torn:
                return
            for path in torn:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.05)

    def restore(self, make_template: Callable[[int], S]) -> S | None:
        """The state of the last complete checkpoint; None where there is none.

        Process 0 reads; the others are sent the state. A best checkpoint from after the last one
        is dropped: the resumed run will come to it again.

        Args:
            make_template: a step -> a state of the structure, shapes and types of that step's.

        Raises:
            UserError: the checkpoint is damaged, or of another network or optimizer.
        """
        last = self.step()
        step = int(parallel.broadcast(np.asarray(-1 if last is None else last)))
        if parallel.is_main_process():
            for late in _list_steps(self._directory / "best"):
                if late > step:
                    self._managers["best"].delete(late)
        if step < 0:
            return None
        state = template = make_template(step)
        if parallel.is_main_process():
            path = self._directory / "last" / str(step)
            restored = _read(self._managers["last"], path, "training", template)
            state = jax.tree.map(_check_like(path), template, restored)
        return parallel.broadcast(state)

    def close(self) -> None:
        """Release the directory."""
        for manager in self.__dict__.get("_managers", {}).values():
            manager.close()


def exists(directory: str | os.PathLike[str]) -> bool:
    """Whether there is a complete last checkpoint in a run's `checkpoints` directory."""
    return bool(_list_steps(pathlib.Path(directory) / "last"))


def _list_steps(directory: pathlib.Path) -> list[int]:
    """The steps of complete checkpoints, which take their names when they are complete."""
    return [int(path.name) for path in directory.glob("*") if path.name.isdigit()]


def load_variables(
    directory: str | os.PathLike[str], name: str = "last"
) -> tuple[dict[str, Any], int]:
    """The model's variables in a run's checkpoint, as NumPy arrays, and its step.

    Args:
        directory: the run's `checkpoints` directory.
        name: "last" or "best".

    Raises:
        NotFoundError: there is no complete checkpoint of that name.
        UserError: it is damaged.
    """
    directory = pathlib.Path(directory).absolute() / name
    if directory.is_dir():
        ocp = _load_orbax()
        options = ocp.CheckpointManagerOptions(
            read_only=True, multiprocessing_options=_work_alone(directory)
        )
        with ocp.CheckpointManager(directory, options=options) as manager:
            step = manager.latest_step()
            if step is not None:
                return _read(manager, directory / str(step), "model"), step
    raise NotFoundError(f"no complete checkpoint below {directory}; let the training save one")


def digest(tree: Any) -> str:
    """A digest of the arrays of a pytree, whatever holds them and in which order."""
    leaves = (np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(tree))
    digests = sorted(hashlib.blake2b(leaf.tobytes(), digest_size=16).digest() for leaf in leaves)
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _read(manager: Any, path: pathlib.Path, item: str, template: Any = None) -> Any:
    """An item of a checkpoint; what orbax raises is one of two things that a user can mend."""
    ocp, step = _load_orbax(), int(path.name)

    def restore(template: Any) -> tuple[Any, str]:
        arguments = {item: ocp.args.StandardRestore(template), "extra": ocp.args.JsonRestore()}
        restored = manager.restore(step, args=ocp.args.Composite(**arguments))
        return restored[item], restored["extra"][item]

    try:
        value, expected = restore(template)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # orbax and tensorstore raise many types
        if "Permission denied" in str(error):
            raise
        if template is not None and (found := _read_whole(restore)) is not None:
            difference = describe_difference(found, template) or "their structures differ"
            raise UserError(
                f"the checkpoint {path} is of another network or optimizer than this config's: "
                f"{difference}. Give another --workdir, or the version and config that wrote it"
            ) from error
        raise UserError(_describe_damage(path, str(error).splitlines()[0])) from error
    if digest(value) != expected:
        raise UserError(_describe_damage(path, "its arrays are not those that were saved"))
    return value


def _read_whole(restore: Any) -> Any:
    """The item as it was saved, None where it is damaged."""
    try:
        value, expected = restore(None)
    except Exception:  # as above
        return None
    return value if digest(value) == expected else None


def describe_difference(found: Any, wanted: Any, most: int = 5) -> str:
    """What keeps one tree of arrays from being used as another, in words; "" where nothing does.

    Args:
        found: the tree that there is.
        wanted: a tree of the structure and shapes that are needed.
        most: names that are listed of each kind.
    """

    def list_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
            for path, leaf in leaves
        }

    there, here = list_shapes(found), list_shapes(wanted)
    kinds = {
        "missing": [f"{name} {here[name]}" for name in here if name not in there],
        "unexpected": [f"{name} {there[name]}" for name in there if name not in here],
        "misshapen": [
            f"{name} {there[name]}, expected {here[name]}"
            for name in here
            if name in there and here[name] != there[name]
        ],
    }
    return "; ".join(
        f"{kind} {', '.join(names[:most])}" + f" and {len(names) - most} more" * (len(names) > most)
        for kind, names in kinds.items()
        if names
    )


def _describe_damage(path: pathlib.Path, why: str) -> str:
    checkpoints = path.parents[1]
    text = f"the checkpoint {path} is damaged ({why[:200]})"
    if path.parent.name == "last" and any((checkpoints / "best").glob("[0-9]*")):
        text += "; --checkpoint best evaluates the best one"
    return f"{text}. To start over, remove {checkpoints} and give the training command again"


def _check_like(path: pathlib.Path) -> Any:
    def check(wanted: Any, found: Any) -> Any:
        if np.shape(wanted) != np.shape(found):
            raise UserError(
                f"the checkpoint {path} holds an array of shape {np.shape(found)} where this "
                f"config's state has {np.shape(wanted)}; give another --workdir"
            )
        return found

    return check

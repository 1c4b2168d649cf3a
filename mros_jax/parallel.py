"""The one place that knows about devices and processes.

A training step is written for one device, with the named axis `AXIS`; `MappedStep` runs it on every
device of every process. The state has no device axis: it goes in and comes out as if there were one
device, so a checkpoint does not know how many devices made it.
"""

import argparse
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mros_jax.errors import UserError
from mros_jax.files import cache_directory

log = logging.getLogger(__name__)

AXIS = "device"
_PIECE = 64 << 20  # bytes of each process that are sent at once
S = TypeVar("S")
T = TypeVar("T")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the processes of a run where the arguments or the environment ask for it.

    Explicit arguments win. Without them, a job of several SLURM tasks (`srun`) and a TPU pod are
    recognised and left to `jax.distributed` to detect. Otherwise nothing happens.

    Args:
        coordinator_address: `host:port` of process 0.
        num_processes: number of processes of the run.
        process_id: this process, from 0.
        timeout: seconds to wait for the others.

    Raises:
        UserError: some but not all of the three were given, one that cannot be, or the others did
            not come in time.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    way_out = ""
    if len(missing) < len(given):
        if missing:
            raise UserError(
                "--coordinator_address, --num_processes and --process_id go together; "
                f"--{' and --'.join(missing)} not given"
            )
        _check_address(coordinator_address, num_processes, process_id)
        if num_processes == 1:
            return
        waiting_for = f"{num_processes} processes at {coordinator_address}"
    elif (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)) > 1:
        waiting_for = f"the {tasks} tasks of this SLURM job step"
        way_out = (
            "; in a shell inside a job, start the command with srun, or alone with "
            "SLURM_STEP_NUM_TASKS=1 before it"
        )
    elif (hosts := len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))) > 1:
        waiting_for = f"the {hosts} hosts of this TPU pod"
    else:
        return
    log.info("Waiting for %s, at most %d seconds%s", waiting_for, timeout, way_out)
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, initialization_timeout=timeout
        )
    except Exception as error:  # jax and its runtime raise many types
        raise UserError(
            f"waited for {waiting_for}, in vain ({str(error).splitlines()[0][:200]}){way_out}"
        ) from error


def _check_address(address: Any, num_processes: Any, process_id: Any) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--coordinator_address is {address!r}; expected HOST:PORT of process 0, as in "
            "10.0.0.1:1234"
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id} of --num_processes {num_processes}; processes count "
            "from 0 to one below their number"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `initialize` is given by a program."""
    several = parser.add_argument_group("a run of several processes")
    several.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--num_processes", type=int, help="processes of the run")
    several.add_argument("--process_id", type=int, help="this process, from 0")


def describe_devices() -> str:
    """What computes: "2 x cpu", or "8 x NVIDIA H100 in 2 processes"."""
    count, device = jax.device_count(), jax.devices()[0]
    processes = jax.process_count()
    text = f"{count} x {device.device_kind}"
    return text if processes == 1 else f"{text} in {processes} processes"


def is_main_process() -> bool:
    """Whether this process writes logs, checkpoints and reports."""
    return jax.process_index() == 0


class MappedStep:
    """`step(state, data, batch) -> (state, metrics)` on all devices, by `jax.pmap`.

    State and data set enter whole on every device, the batch is split on its leading axis, and
    state and metrics leave whole: the step itself must make them equal on all devices. The state's
    buffers are donated.

    Raises:
        RuntimeError: on a call, where it would need a second compilation: a shape or type changed.
    """

    def __init__(
        self, step: Callable[[Any, Any, Any], Any], devices: Sequence[jax.Device] | None = None
    ):
        self._compiled = False

        def compiled_once(state: Any, data: Any, batch: Any) -> Any:
            if self._compiled:
                shapes = jax.tree.map(jnp.shape, batch)
                raise RuntimeError(
                    "the training step would be compiled a second time; its arguments must keep "
                    f"their shapes and types (this batch: {shapes})"
                )
            self._compiled = True
            return step(state, data, batch)

        self._step = jax.pmap(
            compiled_once,
            axis_name=AXIS,
            in_axes=(None, None, 0),
            out_axes=None,
            donate_argnums=(0,),
            devices=devices,
        )

    def __call__(self, state: Any, data: Any, batch: Any) -> tuple[Any, Any]:
        """One step on all devices; returns without waiting for it."""
        result: tuple[Any, Any] = self._step(state, data, batch)
        return result

    def lower(self, state: Any, data: Any, batch: Any) -> jax.stages.Lowered:
        """The step's program for its devices, which need not be there; arguments may be shapes."""
        lowered: jax.stages.Lowered = self._step.lower(state, data, batch)
        return lowered


def _sharding(devices: Sequence[jax.Device] | None, *axes: str | None) -> NamedSharding:
    mesh = Mesh(np.array(devices or jax.local_devices()), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Puts every array of `tree` whole on each device of this process, or on each of `devices`.

    The arrays are copied: the training step donates its state, and must not own its source.
    """
    sharding = _sharding(devices)
    return jax.tree.map(lambda x: jax.device_put(x, sharding, may_alias=False), tree)


def split(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Splits arrays (B, ...) over this process's devices: (devices, B / devices, ...).

    Raises:
        ValueError: B is not a multiple of the number of devices.
    """
    sharding = _sharding(devices, AXIS)
    count = sharding.num_devices

    def put(array: np.ndarray) -> jax.Array:
        if array.shape[0] % count:
            raise ValueError(
                f"a process's batch of {array.shape[0]} cannot be split over its {count} devices; "
                "choose identities x images as a multiple of all devices"
            )
        parts = array.reshape(count, array.shape[0] // count, *array.shape[1:])
        placed: jax.Array = jax.device_put(parts, sharding)
        return placed

    return jax.tree.map(put, tree)


def run_on_all(action: Callable[[], T]) -> T:
    """Have each process do something; where one fails, all do, so that none waits for it.

    The action itself must wait for no other process.

    Raises:
        UserError: in the other processes, where some have failed.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    failed = _gather_array(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failed.any():
        raise UserError(
            f"process {np.argmax(failed)} has ended with an error; its messages say which"
        )
    return result


def run_on_main(action: Callable[[], None]) -> None:
    """Have process 0 do something; the others wait, and fail with it.

    Raises:
        UserError: in the other processes, where process 0 has failed.
    """
    run_on_all(action if is_main_process() else lambda: None)


def gather(compute: Callable[[], T]) -> list[T]:
    """What `compute()` returns in each process, in their order, in every process.

    Any value that can be pickled. Where one process fails, all do, see `run_on_all`.
    """
    value = run_on_all(compute)
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), np.uint8)
    sizes = _gather_array(np.asarray(len(own), np.int64).reshape(1).view(np.uint8))
    lengths = sizes.reshape(-1, 8).view(np.int64)[:, 0]
    # A power of two, so that few shapes are compiled.
    step = min(_PIECE, 1 << (int(lengths.max()) - 1).bit_length())
    whole = [np.empty(length, np.uint8) for length in lengths]
    for start in range(0, int(lengths.max()), step):
        piece = np.zeros(step, np.uint8)
        part = own[start : start + step]
        piece[: len(part)] = part
        for theirs, received in zip(whole, _gather_array(piece), strict=True):
            rest = theirs[start : start + step]
            rest[:] = received[: len(rest)]
    return [pickle.loads(data.data) for data in whole]


def from_main(compute: Callable[[], T]) -> T:
    """Value of `compute()` in process 0, in every process; the others wait, and fail with it."""
    return cast(T, gather(lambda: compute() if is_main_process() else None)[0])


def share(items: Sequence[S], work: Callable[[Sequence[S]], Sequence[T]]) -> list[T]:
    """Results of all items, in their order, in every process; each works on a share of them.

    Process p of P takes items p, p + P, ...: items that lie together may cost alike.

    Args:
        items: the same in every process.
        work: makes a result for each item that it is given.
    """
    index, count = jax.process_index(), jax.process_count()
    results: list[Any] = [None] * len(items)
    for process, part in enumerate(gather(lambda: work(items[index::count]))):
        results[process::count] = part
    return results


def agree(flag: bool) -> bool:
    """Whether `flag` is set in any process: all processes get the same answer."""
    return bool(_gather_array(np.asarray(flag)).any())


def _gather_array(array: np.ndarray) -> np.ndarray:
    """Arrays of one shape and type from all processes, stacked in their order."""
    if jax.process_count() == 1:
        return array[None]
    gathered: np.ndarray = multihost_utils.process_allgather(array)
    return gathered


def broadcast(tree: T) -> T:
    """Process 0's arrays, on every process, as NumPy arrays."""
    if jax.process_count() == 1:
        return tree
    sent: T = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
    return sent


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second start is quick.

    All of them: a run has dozens that compile in less than JAX's least time of a second.
    `JAX_COMPILATION_CACHE_DIR` names another directory; empty, it turns the cache off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory("xla")))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

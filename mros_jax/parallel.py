"""The one place that knows about devices and processes.

A training step is written for one device, with the named axis `AXIS`; `MappedStep` runs it on every
device of every process. The state has no device axis: it goes in and comes out as if there were one
device, so a checkpoint does not know how many devices made it.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mros_jax.files import cache_directory

AXIS = "device"


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run where the arguments or the environment ask for it.

    Explicit arguments win. Without them, a job of several SLURM tasks (`srun`) and a TPU pod are
    recognised and left to `jax.distributed` to detect. Otherwise nothing happens.

    Args:
        coordinator_address: `host:port` of process 0.
        num_processes: number of processes of the run.
        process_id: this process, from 0.

    Raises:
        ValueError: some but not all of the three were given.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ValueError(
                "coordinator_address, num_processes and process_id go together; "
                f"got {coordinator_address!r}, {num_processes!r}, {process_id!r}"
            )
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
        return
    slurm_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if slurm_tasks > 1 or len(tpu_hosts) > 1:
        jax.distributed.initialize()


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

    def __init__(self, step: Callable, devices: Sequence[jax.Device] | None = None):
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
        return self._step(state, data, batch)


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
        return jax.device_put(parts, sharding)

    return jax.tree.map(put, tree)


def agree(flag: bool) -> bool:
    """Whether `flag` is set in any process: all processes get the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def broadcast(tree: Any) -> Any:
    """Process 0's arrays, on every process, as NumPy arrays."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second start is quick.

    `JAX_COMPILATION_CACHE_DIR` names another directory; empty, it turns the cache off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory("xla")))

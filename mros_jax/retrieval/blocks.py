"""One way to map a function over blocks of rows, spread over the local devices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "rows"
_BYTES = 64 * 2**20  # of one block of float32 distances on one device


def choose_block(num_columns: int, block_size: int | None, *, multiple: int = 32) -> int:
    """Rows of a block on one device: `block_size`, or what fits in 64 MiB, in whole `multiple`s."""
    if block_size is None:
        block_size = min(512, _BYTES // 4 // num_columns)
    return max(multiple, block_size // multiple * multiple)


class BlockMap:
    """Calls `function(*row_blocks, *shared)` with the row blocks split over devices.

    The function is compiled once for a shape; `shared` arrays are copied to every device once.

    Args:
        function: jit-able; takes the row arrays, then the shared ones; returns arrays of as many
            rows. Must be a module-level function or one that is made once (see `functools.cache`).
        shared: arrays that every device needs in full.
        devices: default all local devices.
    """

    def __init__(
        self,
        function: Callable,
        shared: Sequence[Any] = (),
        *,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = tuple(devices if devices is not None else jax.local_devices())
        self.num_devices = len(devices)
        self._function = _compile(function, len(shared), devices)
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._shared = [jax.device_put(array, everywhere) for array in shared]

    def __call__(self, *rows: Any) -> Any:
        """Start one block (rows divisible by the number of devices); returns without waiting."""
        return self._function(
            *(jax.device_put(array, self._split) for array in rows), *self._shared
        )


@functools.cache
def _compile(function: Callable, num_shared: int, devices: tuple) -> Callable:
    mesh = Mesh(np.asarray(devices), (_AXIS,))

    def call(*arrays: Any) -> Any:
        split = len(arrays) - num_shared
        specs = (PartitionSpec(_AXIS),) * split + (PartitionSpec(),) * num_shared
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(_AXIS), check_vma=False
        )
        return mapped(*arrays)

    return jax.jit(call)


def pad_rows(array: np.ndarray | jax.Array, rows: int) -> np.ndarray | jax.Array:
    """Repeat the last row until there are `rows` (the extra results are thrown away)."""
    missing = rows - len(array)
    if missing == 0:
        return array
    xp = jax.numpy if isinstance(array, jax.Array) else np
    return xp.concatenate([array, xp.repeat(array[-1:], missing, axis=0)])


def run_ahead(calls: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield (key, fetched result) with the next call already started: host and device overlap."""
    waiting = None
    for item in calls:
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])
        waiting = item
    if waiting is not None:
        yield waiting[0], jax.device_get(waiting[1])

"""One way to map functions over blocks of rows, spread over devices and processes."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from mros_jax import parallel
from mros_jax.errors import UserError
from mros_jax.retrieval.inputs import check_count

MULTIPLE = 8  # blocks have a multiple of so many rows on each device
_NARROW = 512  # numbers of a descriptor
WIDE = 4096  # the same: so many are wide for a CPU
_AXIS = "rows"
_ALIGNMENT = 64  # bytes; what XLA asks for
_BYTES = 64 * 2**20  # of one block of float32 distances on one device, at most
_BYTES_ON_HOST = 32 * 10**6
THREADS = 8  # at most: each holds a block

S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where work is done, and how much at once. It changes no result but for float32 rounding.

    Attributes:
        devices: blocks of queries are spread over them; None: all local devices.
        block_size: queries in a block on one device; None: 64 to 512 (see `choose_block`).
        together: all processes of the run make the same call with the same data; each works on a
            share of the blocks, and all get the whole. Otherwise a process works by itself.
    """

    devices: Sequence[jax.Device] | None = None
    block_size: int | None = None
    together: bool = False

    def __post_init__(self) -> None:
        if self.block_size is not None:
            check_count(self.block_size, "block_size")
        if self.devices is not None and len(self.devices) == 0:
            raise UserError("devices is empty; expected at least one, or None for all local ones")

    def list_devices(self) -> tuple[jax.Device, ...]:
        """The devices, all local ones where none are named."""
        return tuple(jax.local_devices() if self.devices is None else self.devices)

    def is_host(self) -> bool:
        """Whether the devices are the host's own processor, with its memory."""
        return all(device.platform == "cpu" for device in self.list_devices())

    def alone(self) -> "Placement":
        """The same for what one process does by itself."""
        return dataclasses.replace(self, together=False)


EVERYWHERE = Placement()


def choose_block(
    num_columns: int,
    num_features: int = _NARROW,
    block_size: int | None = None,
    *,
    host: bool = False,
) -> int:
    """Rows of a block on one device, a multiple of 8.

    A CPU has as many as a descriptor has numbers, from 128 to 384, but 64 of wide descriptors,
    whose products are quicker so, and at most 32 MB of distances: larger blocks are memory that the
    system gives anew each time. Accelerators, which are quick enough to wait for the gallery that
    is read again for each block, have up to 512 rows of wide descriptors and at most 64 MiB of
    distances. Never fewer than 64 rows; `block_size` overrides all of this.

    Args:
        num_columns: numbers in a row of what a block computes.
        num_features: numbers in a descriptor.
        block_size: of a `Placement`.
        host: whether the device is a CPU.
    """
    if block_size is None:
        if host:
            rows = 64 if num_features >= WIDE else min(384, max(128, num_features))
        else:
            rows = min(512, max(128, int(128 * math.sqrt(num_features / _NARROW))))
        most = _BYTES_ON_HOST if host else _BYTES
        block_size = max(64, min(rows, most // 4 // num_columns))
    return max(MULTIPLE, block_size // MULTIPLE * MULTIPLE)


def place_everywhere(array: Any, placement: Placement = EVERYWHERE) -> jax.Array:
    """Copy an array to every device."""
    mesh = Mesh(np.asarray(placement.list_devices()), (_AXIS,))
    placed: jax.Array = jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
    return placed


def empty_aligned(shape: tuple[int, int]) -> Float32[np.ndarray, "N D"]:
    """Uninitialised float32 memory that JAX can use on a CPU without another copy."""
    size = shape[0] * shape[1] * 4
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + size].view(np.float32).reshape(shape)


def narrow(rows: np.ndarray) -> np.ndarray | slice:
    """Rising rows as a slice, which copies nothing, where they follow one another."""
    following = len(rows) and rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if following else rows


def take_rows(
    array: Float32[np.ndarray | jax.Array, "N D"], rows: np.ndarray
) -> Float32[np.ndarray | jax.Array, "M D"]:
    """array[rows] of rising rows, in memory that JAX can use on a CPU without another copy.

    Not to be written to: rows that follow one another are a view.
    """
    part = narrow(rows)
    if isinstance(part, slice) or isinstance(array, jax.Array):
        return array[part]
    out = empty_aligned((len(rows), array.shape[1]))
    return np.take(array, rows, axis=0, out=out, mode="clip")


def concatenate(parts: Sequence[Float32[np.ndarray, "_ D"]]) -> Float32[np.ndarray, "N D"]:
    """Rows of all parts, in memory that JAX can use on a CPU without another copy."""
    out = empty_aligned((sum(map(len, parts)), parts[0].shape[1]))
    return np.concatenate(parts, out=out)


def map_on_host(
    function: Callable[[S], T],
    items: Sequence[S],
    placement: Placement = EVERYWHERE,
    *,
    threads: int = THREADS,
) -> list[T]:
    """Results of all items, in threads; processes that work together share the items."""
    with concurrent.futures.ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:

        def work(own: Sequence[S]) -> list[T]:
            return list(pool.map(function, own))

        return parallel.share(items, work) if placement.together else work(items)


class BlockMap:
    """Maps functions over blocks of rows, split over devices.

    `function(*row arrays, *shared)` makes the result of a block. With `look`, the result is that of
    `look(function(first row array, *shared), *other row arrays)`, in two programs: what is looked
    at are numbers in memory. In one program a compiler may compute a distance anew, with another
    rounding, in each place that uses it, and comparisons of a distance with itself go wrong.

    Functions are compiled once for a shape; `shared` arrays are copied to every device once.

    Args:
        function: jit-able, to arrays of as many rows. Must be a module-level function or one that
            is made once (see `functools.cache`); `look` too.
        shared: arrays that every device needs in full.
        look: see above.
        placement: devices and block size.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        shared: Sequence[Any] = (),
        *,
        look: Callable[..., Any] | None = None,
        placement: Placement = EVERYWHERE,
    ):
        devices = placement.list_devices()
        self._num_devices = len(devices)
        self._placement = placement
        self._function = _compile(function, len(shared), devices)
        self._look = None if look is None else _compile(look, 0, devices)
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._shared = [place_everywhere(array, placement) for array in shared]

    def __call__(self, *rows: Any) -> Any:
        """Start one block (rows divisible by the number of devices); returns without waiting."""
        placed = [jax.device_put(array, self._split) for array in rows]
        if self._look is None:
            return self._function(*placed, *self._shared)
        return self._look(self._function(placed[0], *self._shared), *placed[1:])

    def run(
        self,
        num_rows: int,
        num_columns: int,
        get: Callable[[slice], Sequence[Any]],
        finish: Callable[[slice, Any], Any] | None = None,
        *,
        num_features: int = _NARROW,
    ) -> Iterator[tuple[slice, Any]]:
        """Map all rows; the next block is started before the last one is fetched.

        Processes that work together hold the results of all blocks before the first is given out.

        Args:
            num_rows: rows in all.
            num_columns: numbers in a row of what a block computes, which decides its size.
            get: the row arrays of a slice of rows.
            finish: what to make of a slice and its result on the host, while the devices are at
                the next block; the result if None.
            num_features: numbers in a descriptor that a block starts from.

        Yields:
            The slice of rows, and the function's result on the host, or what `finish` made of it.
        """
        least = MULTIPLE * self._num_devices
        step = choose_block(
            num_columns,
            num_features,
            self._placement.block_size,
            host=self._placement.is_host(),
        )
        together = self._placement.together
        share = -(-num_rows // (jax.process_count() if together else 1))
        num_blocks = -(-share // (step * self._num_devices))
        step = -(-share // (num_blocks * least)) * least  # as even as can be
        slices = [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]

        def work(slices: Sequence[slice]) -> Iterator[Any]:
            waiting = None
            for rows in slices:
                started = rows, self(*(pad_rows(array, step) for array in get(rows)))
                if waiting is not None:
                    yield fetch(*waiting)
                waiting = started
            if waiting is not None:
                yield fetch(*waiting)

        def fetch(rows: slice, result: Any) -> Any:
            num = rows.stop - rows.start
            block = jax.tree.map(lambda array: array[:num], jax.device_get(result))
            return block if finish is None else finish(rows, block)

        results = parallel.share(slices, lambda own: list(work(own))) if together else work(slices)
        return zip(slices, results, strict=True)

    def collect(self, num_rows: int, *args: Any, **kwargs: Any) -> Any:
        """As `run`, but returns the results of all rows together.

        They may be memory of a device: not to be written to.
        """
        result = None
        for rows, block in self.run(num_rows, *args, **kwargs):
            if rows == slice(0, num_rows):
                return block
            if result is None:
                result = jax.tree.map(
                    lambda array: np.empty((num_rows, *array.shape[1:]), array.dtype), block
                )
            for whole, part in zip(jax.tree.leaves(result), jax.tree.leaves(block), strict=True):
                whole[rows] = part
        return result


@functools.cache
def _compile(
    function: Callable[..., Any], num_shared: int, devices: tuple[jax.Device, ...]
) -> jax.stages.Wrapped:
    mesh = Mesh(np.asarray(devices), (_AXIS,))

    def call(*arrays: Any) -> Any:
        split = len(arrays) - num_shared
        specs = (PartitionSpec(_AXIS),) * split + (PartitionSpec(),) * num_shared
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(_AXIS), check_vma=False
        )
        return mapped(*arrays)

    return jax.jit(call)


def lower(
    function: Callable[..., Any],
    rows: Sequence[jax.ShapeDtypeStruct],
    shared: Sequence[jax.ShapeDtypeStruct],
    devices: Sequence[jax.Device],
) -> jax.stages.Lowered:
    """The program of one block of a `BlockMap`, for devices that need not be there.

    Args:
        function: as for `BlockMap`.
        rows: shapes of the row arrays, of all devices together.
        shared: shapes of the others.
        devices: what the program is for.
    """
    mesh = Mesh(np.asarray(devices), (_AXIS,))

    def put(array: jax.ShapeDtypeStruct, *axes: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    arguments = [*(put(array, _AXIS) for array in rows), *(put(array) for array in shared)]
    return _compile(function, len(shared), tuple(devices)).lower(*arguments)


def pad_rows(array: np.ndarray | jax.Array, rows: int) -> np.ndarray | jax.Array:
    """Repeat the last row until there are `rows` (the extra results are thrown away)."""
    missing = rows - len(array)
    if missing == 0:
        return array
    if isinstance(array, jax.Array):
        return jnp.concatenate([array, jnp.repeat(array[-1:], missing, axis=0)])
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])

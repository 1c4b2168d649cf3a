"""Make things ahead in threads while what was made before is in use."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from mros_jax.errors import UserError

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(
    items: Iterable[Item],
    make: Callable[[Item], Made],
    *,
    depth: int = 2,
    num_threads: int = 1,
) -> Generator[Made, None, None]:
    """Yield `make(item)` for every item, in order, made ahead in threads.

    The threads end when the items do, when `make` raises (the exception comes out here), and when
    this iterator is closed or collected.

    Args:
        items: what to make something of, for example rows of a plan. It may be endless.
        make: makes it, for example gathers a batch and puts it on the devices.
        depth: how many are made ahead at most; each takes memory until it is its turn.
        num_threads: how many are made at a time.

    Raises:
        UserError: `depth` below 1.
    """
    if depth < 1:
        raise UserError(f"prefetch depth is {depth}; it must be at least 1")
    return _prefetch(items, make, depth, num_threads)


def _prefetch(
    items: Iterable[Item], make: Callable[[Item], Made], depth: int, num_threads: int
) -> Generator[Made, None, None]:
    ahead: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_threads, "prefetch") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(make, item))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

"""The next batches are made in a thread while the accelerator works on this one."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_POLL_SECONDS = 0.1


def prefetch(items: Iterable[Any], make: Callable[[Any], Any], *, depth: int = 2) -> Iterator[Any]:
    """Yields `make(item)` for every item, in order, made ahead in a thread.

    The thread ends when the items do, when `make` raises (the exception comes out here), and when
    this iterator is closed or collected.

    Args:
      items: what to make batches of, for example rows of a plan.
      make: gathers a batch and puts it on the devices.
      depth: batches that wait at most; each takes memory on the devices.

    Raises:
      ValueError: depth below 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth must be at least 1, got {depth}")
    return _prefetch(items, make, depth)


def _prefetch(items: Iterable[Any], make: Callable[[Any], Any], depth: int) -> Iterator[Any]:
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def offer(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                offer("batch", make(item))
            offer("end", None)
        except BaseException as error:
            offer("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()

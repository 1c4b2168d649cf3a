"""Logs of a run: JSON lines that a resumed run continues exactly, and TensorBoard events.

`metrics.jsonl` holds only what is a function of config and seed, so that two runs can be compared
byte by byte; wall-clock figures go to `timing.jsonl`.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from mros_jax import extras
from mros_jax.files import write_atomically
from mros_jax.runs.run import Run, read_records

log = logging.getLogger(__name__)


class Writer:
    """Appends records to a run's logs, continuing after step `start_step`.

    Whatever an interrupted run logged beyond its last checkpoint is dropped, since it will be
    computed again.

    Args:
        run: whose logs they are.
        start_step: step of the checkpoint that the run goes on from.
        keep_evaluation: keep the record of an evaluation at `start_step`; otherwise it comes again.
    """

    def __init__(self, run: Run, start_step: int = 0, *, keep_evaluation: bool = True):
        def keep(record: Mapping[str, Any]) -> bool:
            again = record.get("kind") == "eval" and not keep_evaluation
            step: int = record["step"]
            return step < start_step + (not again)

        self._files = {
            "metrics": _reopen(run.metrics_file, keep),
            "timing": _reopen(run.timing_file, keep, kind=False),
        }
        self._events = None
        if message := extras.find_missing("tensorboard", "A TensorBoard log"):
            log.info("%s", message)
        else:
            self._events = _Events(run.tensorboard, start_step)

    def _write(self, name: str, prefix: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(dict(record)) + "\n")
        shown = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "epoch")
        }
        if self._events is not None:
            for key, value in shown.items():
                self._events.add_scalar(record["step"], f"{prefix}/{key}", value)

    def metrics(self, kind: str, record: Mapping[str, Any]) -> None:
        """Log one record of `kind` ("train" or "eval"); it must hold "step" and "epoch"."""
        self._write("metrics", kind, {"kind": kind, **record})

    def timing(self, record: Mapping[str, Any]) -> None:
        """Log wall-clock figures; the record must hold "step"."""
        self._write("timing", "timing", record)

    def flush(self) -> None:
        """Bring everything logged so far to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close the logs; all of them, also where one cannot be written."""
        with contextlib.ExitStack() as stack:
            if self._events is not None:
                stack.callback(self._events.close)
            for file in self._files.values():
                stack.callback(file.close)
            self.flush()


class _Events:
    """A TensorBoard log, in which whatever is after step `start_step` begins anew.

    It is written in this thread: a writer of its own would meet a full disk unheard.
    """

    def __init__(self, directory: pathlib.Path, start_step: int):
        with _without("torch"):
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        directory.mkdir(exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(directory / "events"))
        self._make_event, self._make_scalar = event_pb2.Event, summary.scalar
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(start_step + 1, session_log=begin)
        self.flush, self.close = self._writer.flush, self._writer.close

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._make_event(wall_time=time.time(), step=step, **content))

    def add_scalar(self, step: int, name: str, value: float) -> None:
        self._add(step, summary=self._make_scalar(name, value))


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Let what is imported do without a package: where it is installed it can take seconds."""
    loaded = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(loaded)


def _reopen(
    path: pathlib.Path, keep: Callable[[Mapping[str, Any]], bool], *, kind: bool = True
) -> TextIO:
    kept = [record for record in read_records(path, kind=kind) if keep(record)]
    with write_atomically(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept))
    return path.open("a", encoding="utf-8")

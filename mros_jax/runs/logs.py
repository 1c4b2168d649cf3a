"""Logs of a run: JSON lines that a resumed run continues exactly, and TensorBoard events.

`metrics.jsonl` holds only what is a function of config and seed, so that two runs can be compared
byte by byte; wall-clock figures go to `timing.jsonl`.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mros_jax.files import write_atomically
from mros_jax.runs.run import Run, read_records


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
            return record["step"] < start_step + (not again)

        self._files = {
            "metrics": _reopen(run.metrics_file, keep),
            "timing": _reopen(run.timing_file, keep, kind=False),
        }
        run.tensorboard.mkdir(exist_ok=True)
        # In this thread: a writer of its own would meet a full disk unheard.
        self._events = EventsWriter(str(run.tensorboard / "events"))
        self._log_event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, name: str, prefix: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(dict(record)) + "\n")
        shown = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "epoch")
        }
        for key, value in shown.items():
            self._log_event(record["step"], summary=summary.scalar(f"{prefix}/{key}", value))

    def _log_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

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
        self._events.flush()

    def close(self) -> None:
        """Flush and close the logs; all of them, also where one cannot be written."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._events.close)
            for file in self._files.values():
                stack.callback(file.close)
            self.flush()


def _reopen(path: pathlib.Path, keep: Callable[[Mapping[str, Any]], bool], *, kind: bool = True):
    kept = [record for record in read_records(path, kind=kind) if keep(record)]
    with write_atomically(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept))
    return path.open("a", encoding="utf-8")

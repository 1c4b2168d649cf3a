"""Logs of a run: JSON lines that a resumed run continues exactly, and TensorBoard events.

`metrics.jsonl` holds only what is a function of config and seed, so that two runs can be compared
byte by byte; wall-clock figures go to `timing.jsonl`.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorboardX

from mros_jax.files import read_jsonl


class Writer:
    """Appends records to a run's logs, continuing after step `start_step`.

    Whatever an interrupted run logged beyond its last checkpoint is dropped, since it will be
    computed again.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        self._workdir = pathlib.Path(workdir)
        self._files = {
            name: self._open(self._workdir / f"{name}.jsonl", start_step)
            for name in ("metrics", "timing")
        }
        self._events = tensorboardX.SummaryWriter(
            str(self._workdir / "tensorboard"), purge_step=start_step + 1
        )

    @staticmethod
    def _open(path: pathlib.Path, start_step: int):
        kept = [record for record in read_jsonl(path) if record["step"] <= start_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        return path.open("a")

    def _write(self, name: str, prefix: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(dict(record)) + "\n")
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                self._events.add_scalar(f"{prefix}/{key}", value, record["step"])

    def metrics(self, kind: str, record: Mapping[str, Any]) -> None:
        """Logs one record of `kind` ("train" or "eval"); it must hold "step" and "epoch"."""
        self._write("metrics", kind, {"kind": kind, **record})

    def timing(self, record: Mapping[str, Any]) -> None:
        """Logs wall-clock figures; the record must hold "step"."""
        self._write("timing", "timing", record)

    def flush(self) -> None:
        """Brings everything logged so far to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the logs."""
        self.flush()
        for file in self._files.values():
            file.close()
        self._events.close()

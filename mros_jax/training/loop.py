"""What surrounds the steps of a run: batches in, metrics out, signals, and the run's directory."""

import json
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mros_jax import parallel
from mros_jax.files import write_json
from mros_jax.runs.logs import Writer
from mros_jax.training.feed import Sizes


class Stop:
    """Whether the run shall stop: SIGINT or SIGTERM has come. A second signal kills as usual.

    Attributes:
        agreed: all processes know that they stop after the same step.
    """

    def __init__(self):
        self._requested = False
        self.agreed = False

    def poll(self, at_log_point: bool) -> bool:
        """Whether to stop after this step; processes come to an agreement only at log points."""
        if jax.process_count() == 1 or at_log_point:
            self.agreed = parallel.agree(self._requested)
        return self.agreed

    def _request(self, signum: int, frame: Any) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def __enter__(self) -> "Stop":
        self._former = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()


class Logger:
    """Collects the metrics of steps on the device, and brings them to disk and eyes together."""

    def __init__(self, writer: Writer | None, bar: tqdm, sizes: Sizes):
        self._writer, self._bar, self._sizes = writer, bar, sizes
        self._pending: list[tuple[int, Any]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step, still on the device."""
        self._pending.append((step, metrics))

    def flush(self, last_saved: int | None) -> None:
        """Fetches, logs and checks all metrics taken since the last flush.

        Args:
            last_saved: step of the last checkpoint, for the error.

        Raises:
            FloatingPointError: a loss was NaN or infinite.
        """
        if not self._pending:
            return
        records = [
            {
                "step": step,
                "epoch": (step - 1) // self._sizes.steps_per_epoch,
                **{name: float(value) for name, value in metrics.items()},
            }
            for step, metrics in jax.device_get(self._pending)
        ]
        self._pending = []
        seconds = time.perf_counter() - self._since
        speed = len(records) * self._sizes.batch / seconds
        good = next((i for i, r in enumerate(records) if not np.isfinite(r["loss"])), len(records))
        if self._writer:
            for record in records[:good]:
                self._writer.metrics("train", record)
            self._writer.timing(
                {"step": records[-1]["step"], "seconds": seconds, "images_per_second": speed}
            )
            self._writer.flush()
        if good < len(records):
            raise _diverged(records[good], last_saved)
        shown = {
            name.removeprefix("loss/"): f"{value:.3g}"
            for name, value in records[-1].items()
            if name.startswith(("loss", "lr"))
        }
        self._bar.set_postfix(shown | {"img/s": f"{speed:.0f}"}, refresh=False)
        self._bar.update(len(records))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last flush out of the speed."""
        self._since = time.perf_counter()


def _diverged(record: dict[str, Any], last_saved: int | None) -> FloatingPointError:
    parts = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("step", "epoch", "loss"))
    good = "none was saved yet" if last_saved is None else f"that of step {last_saved}"
    return FloatingPointError(
        f"the loss is {record['loss']} at step {record['step']} (epoch {record['epoch']}): "
        f"{parts}. Last good checkpoint: {good}. Try a lower rate "
        "(optimizer.GROUP.lr), clip_norm, or dtype=float32."
    )


def claim_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes `workdir` this config's, or checks that it already is.

    Raises:
        ValueError: the directory belongs to a run of another config (names the differences), or is
            something else.
    """
    path = workdir / "config.json"
    resolved = json.loads(config.to_json())
    if path.exists():
        differences = _compare(json.loads(path.read_text()), resolved)
        if differences:
            raise ValueError(
                f"{workdir} belongs to a run of another config; give another --workdir, or the "
                "same config to resume. Differences (there -> here):\n  " + "\n  ".join(differences)
            )
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and not a run; give another --workdir")
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, resolved)


def _compare(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in sorted(there.keys() | here.keys())
            for line in _compare(
                there.get(key, "(absent)"), here.get(key, "(absent)"), f"{name}.{key}".strip(".")
            )
        ]
    return [] if there == here else [f"{name}: {there!r} -> {here!r}"]

"""What surrounds the steps of a run: metrics out, and signals."""

import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mros_jax import parallel
from mros_jax.errors import DivergedError
from mros_jax.runs.logs import Writer
from mros_jax.training.feed import Sizes


class Stop:
    """Whether the run shall stop: SIGINT or SIGTERM has come. A second signal kills as usual.

    Outside the main thread Python lets nobody listen to signals; then nothing stops the run.

    Attributes:
        agreed: all processes know that they stop after the same step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._former: dict[int, Any] = {}
        self.agreed = False

    def poll(self, at_log_point: bool) -> bool:
        """Tell whether to stop after this step; processes agree on it only at log points."""
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
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM)
            self._former = {s: signal.signal(s, self._request) for s in signals}
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()


class Logger:
    """Collects the metrics of steps on the device, then writes and shows them together."""

    def __init__(self, writer: Writer | None, bar: tqdm, sizes: Sizes):
        self._writer, self._bar, self._sizes = writer, bar, sizes
        self._pending: list[tuple[int, Any]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Any) -> None:
        """Take the metrics of a step, still on the device."""
        self._pending.append((step, metrics))

    def flush(self, last_saved: int | None) -> None:
        """Fetch, log and check all metrics taken since the last flush.

        Args:
            last_saved: step of the last checkpoint, for the error.

        Raises:
            DivergedError: a loss was NaN or infinite.
        """
        if not self._pending:
            return
        records = [
            {
                "step": step,
                "epoch": step // self._sizes.steps_per_epoch,
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
        """Leave what happened since the last flush out of the speed."""
        self._since = time.perf_counter()


def _diverged(record: dict[str, Any], last_saved: int | None) -> DivergedError:
    parts = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("step", "epoch", "loss"))
    good = "none was saved yet" if last_saved is None else f"that of step {last_saved}"
    return DivergedError(
        f"the loss is {record['loss']} at step {record['step']} (epoch {record['epoch']}): "
        f"{parts}. Last good checkpoint: {good}. Start again with a lower rate "
        "(optimizer.GROUP.lr), clip_norm or dtype=float32, and a new --workdir, since a run keeps "
        "its config"
    )

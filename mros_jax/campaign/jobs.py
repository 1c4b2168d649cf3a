"""The trainings of a campaign, each in a process of its own, one after another.

A folder holds `runs/NAME-seedN/`, the runs; `logs/`, what their processes say; and `ledger.json`,
what became of each. Called again with the same folder, `train` goes on where it was.
"""

import contextlib
import dataclasses
import logging
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from mros_jax.campaign.systems import System
from mros_jax.errors import UserError
from mros_jax.files import read_json, write_json
from mros_jax.runs import lock
from mros_jax.runs.run import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One system with one seed.

    Attributes:
        system: what is trained.
        seed: of the run.
        folder: of the campaign.
    """

    system: System
    seed: int
    folder: pathlib.Path

    @property
    def name(self) -> str:
        """Of its run, and in the ledger."""
        return f"{self.system.name}-seed{self.seed}"

    @property
    def run(self) -> Run:
        """Its run, which may not be there yet."""
        return Run(self.folder / "runs" / self.name)

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments of the training."""
        return (*self.system.words, f"--config.seed={self.seed}", f"--workdir={self.run.path}")

    def is_complete(self) -> bool:
        """Whether the run has its results.

        Raises:
            UserError: the directory is another run's or in use, or its results are damaged.
        """
        config = self.system.read()
        config.seed = self.seed
        self.run.check_free(config)
        return self.run.results_file.is_file() and bool(self.run.rankings)


def make_jobs(
    systems: Sequence[System], seeds: Sequence[int], folder: pathlib.Path
) -> tuple[Job, ...]:
    """All systems with the first seed, then all with the next: what is first is there first."""
    folder = folder.absolute()
    return tuple(Job(system, seed, folder) for seed in seeds for system in systems)


class Ledger:
    """What became of the processes of a folder, by name, in `ledger.json`.

    Args:
        folder: of the campaign.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self._path = folder / "ledger.json"
        entries = read_json(self._path) if self._path.exists() else {}
        whole = isinstance(entries, dict) and all(isinstance(e, dict) for e in entries.values())
        if not whole:
            raise UserError(f"{self._path} is no ledger of jobs; remove it (the runs are kept)")
        self._entries: dict[str, dict[str, Any]] = entries

    def seconds(self, name: str) -> float:
        """What it took, all its starts together; 0 where it was never started."""
        return float(self._entries.get(name, {}).get("seconds", 0.0))

    def failure(self, name: str) -> str | None:
        """Why it failed; None where it did not."""
        return self._entries.get(name, {}).get("failure")

    def add(self, name: str, seconds: float, failure: str | None = None) -> None:
        """Write down a start: how long it took, and why it failed if it did."""
        total = self.seconds(name) + seconds
        self._entries[name] = {"seconds": round(total, 3), "failure": failure}
        write_json(self._path, self._entries)


def run_process(words: Sequence[str], file: pathlib.Path) -> int:
    """Run `python -m WORDS...`, append what it says to a file, and return its exit code.

    Ctrl-C and SIGTERM are passed on once; it is waited for, so that it can save what it has.

    Raises:
        KeyboardInterrupt: after it has ended.
    """
    with file.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through us, and once
        )
        try:
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            raise


def train(jobs: Sequence[Job], ledger: Ledger) -> None:
    """Train what is not trained yet; a job that fails is written down, and the next begins.

    Raises:
        KeyboardInterrupt: after the job that was running has saved its state.
    """
    for number, job in enumerate(jobs, start=1):
        try:
            if job.is_complete():
                if ledger.failure(job.name):
                    ledger.add(job.name, 0.0)
                continue
        except UserError as error:
            log.warning("%s: %s", job.name, error)
            ledger.add(job.name, 0.0, failure=str(error))
            continue
        log.info("%d of %d, %s: %s", number, len(jobs), job.name, job.run.path)
        failure = run_step(job, job.name, ["mros_jax.train", *job.words], ledger)
        if failure is None and not job.run.results_file.is_file():
            failure = "the training ended without results"
            ledger.add(job.name, 0.0, failure)
        if failure is not None:
            log.warning("%s failed: %s", job.name, failure)


@runtime_checkable
class Runner(Protocol):
    """What a process is run for: something with a name in a campaign's folder."""

    @property
    def name(self) -> str:
        """Of its log."""
        ...

    @property
    def folder(self) -> pathlib.Path:
        """Of the campaign."""
        ...

    @property
    def run(self) -> Run:
        """The run that it makes or evaluates."""
        ...


def run_step(job: Runner, name: str, words: Sequence[str], ledger: Ledger) -> str | None:
    """Run a command that belongs to a job, and write down how long it took; why it failed.

    Args:
        job: whose log it writes to.
        name: in the ledger.
        words: of `run_process`.
        ledger: of the folder.
    """
    file = job.folder / "logs" / f"{job.name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.stat().st_size if file.exists() else 0
    since, failure = time.monotonic(), None
    try:
        code = run_process(words, file)
        failure = _explain(file, begun, code) if code else None
    finally:
        ledger.add(name, time.monotonic() - since, failure)
    return failure


def _explain(file: pathlib.Path, begun: int, code: int) -> str:
    """Why a process ended with an exit code: what it said last, or its error."""
    with file.open("rb") as log_file:
        log_file.seek(begun)
        said = log_file.read().decode(errors="replace").splitlines()
    lines = [line.strip() for line in said if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{(told or lines or ['nothing said'])[-1]} ({killed}; see {file})"


@contextlib.contextmanager
def open_folder(folder: pathlib.Path) -> Iterator[Ledger]:
    """Hold a campaign's folder, made where it is missing; SIGTERM ends what is done with it, too.

    Raises:
        UserError: another process has it, or its ledger is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        advice = "wait for it or end it, or give another --out"
        with lock.hold(folder / ".lock", advice):
            yield Ledger(folder)
    finally:
        signal.signal(signal.SIGTERM, former)

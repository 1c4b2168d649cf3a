"""A run is a directory: its files, what they say, and who may write them.

run = Run.open("runs/market")
run.config["seed"], run.rankings[0]["mAP"], run.checkpoints
"""

import contextlib
import fnmatch
import functools
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mros_jax.errors import NotFoundError, UserError
from mros_jax.files import read_json, read_jsonl, write_json
from mros_jax.retrieval import descriptors
from mros_jax.runs import lock
from mros_jax.runs.results import read_results

log = logging.getLogger(__name__)

FORMAT = 1  # of the directory: its files, and what they hold

# Fields that change nothing about what a run computes: a resumed run may have others.
FREE_FIELDS = (
    "dataset.root",
    "dataset.cache_dir",
    "dataset.device_fraction",
    "eval.batch_size",
    "checkpoint_every_epochs",
    "log_every_steps",
    "report",
)
# What a directory may hold and still be an empty one: what file systems, shells and job systems
# leave there, and what a killed process of ours leaves before the directory is a run.
_STRAY_FILES = ("lost+found", "*.log", "*.out", "*.err", ".nfs*", ".DS_Store", "run.json", ".lock")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")

_REPAIR = "restore the file from a copy, or train again in another --workdir"


class Run:
    """A run directory.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Open a run that is there.

        Raises:
            NotFoundError: `path` is no run.
            UserError: one of another version, or its config.json or run.json is damaged.
        """
        run = cls(path)
        if not run.exists():
            why = "it has no config.json" if run.path.is_dir() else "there is no such directory"
            raise NotFoundError(f"{path} is not a run: {why}; give the --workdir of a training run")
        _ = run.record, run.config
        return run

    def exists(self) -> bool:
        """Whether the directory is a run."""
        return self.config_file.is_file()

    @property
    def config_file(self) -> pathlib.Path:
        """The resolved config; the last file to be written of those that make a run."""
        return self.path / "config.json"

    @property
    def record_file(self) -> pathlib.Path:
        """Version of the layout, provenance, data set."""
        return self.path / "run.json"

    @property
    def metrics_file(self) -> pathlib.Path:
        """A line for each training step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def timing_file(self) -> pathlib.Path:
        """Wall-clock figures."""
        return self.path / "timing.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """Directory of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> pathlib.Path:
        """Directory of the checkpoints "last" and "best"."""
        return self.path / "checkpoints"

    @property
    def results_file(self) -> pathlib.Path:
        """Scores of the final evaluation."""
        return self.path / "results.json"

    @property
    def report_file(self) -> pathlib.Path:
        """The page with everything."""
        return self.path / "report.html"

    def features_file(
        self,
        dataset: str,
        fingerprints: Mapping[str, str],
        *,
        flip_test: bool = False,
        crops: str = "none",
        checkpoint: str = "last",
    ) -> pathlib.Path:
        """Descriptors of queries and gallery, a file of its own for whatever makes them others.

        Args:
            dataset: the data set's name.
            fingerprints: of its splits "query" and "gallery"; the run's own are `features.npz`.
            flip_test: whether they are means over image and mirror image.
            crops: of images, "none" or "ten", that they are means over.
            checkpoint: "last" or "best".
        """
        words = ["features"]
        tested = [fingerprints[split] for split in ("query", "gallery")]
        own = [self.fingerprints[split] for split in ("query", "gallery")]
        # A run that was trained elsewhere knows its data set by name alone.
        if tested != own and (any(own) or dataset != self.dataset):
            words += [dataset, *(text[:8] for text in tested)]
        words += [checkpoint] * (checkpoint != "last") + ["flip"] * flip_test
        words += [f"{crops}crops"] * (crops != "none")
        return self.path / f"{'-'.join(words)}.npz"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        config = self._read(self.config_file)
        if missing := [name for name in ("name", "seed", "dataset", "input") if name not in config]:
            raise UserError(f"{self.config_file} lacks {', '.join(missing)}; {_REPAIR}")
        return config

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """`run.json`: provenance and data set."""
        record = self._read(self.record_file)
        if record.get("format") != FORMAT:
            raise UserError(
                f"{self.path} is a run of format {record.get('format')!r}, this version reads "
                f"{FORMAT}; use the version that wrote it ({record.get('commit')}), or train again"
            )
        data = record.get("dataset")
        data = data if isinstance(data, dict) else {}
        prints, classes = data.get("fingerprints"), data.get("num_classes")
        splits = ("train", "query", "gallery")
        known = isinstance(prints, dict) and all(isinstance(prints.get(s), str) for s in splits)
        if not known or not isinstance(classes, int) or not isinstance(data.get("name"), str):
            raise UserError(
                f"{self.record_file} lacks the data set's name, num_classes and fingerprints; "
                f"{_REPAIR}"
            )
        return record

    def _read(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            value = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; {_REPAIR}") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} holds no JSON object but {str(value)[:40]!r}; {_REPAIR}")
        return value

    @property
    def num_classes(self) -> int:
        """Training identities."""
        num_classes: int = self.record["dataset"]["num_classes"]
        return num_classes

    @property
    def fingerprints(self) -> dict[str, str]:
        """Split -> fingerprint of the data that the run was started with; "" of an imported one."""
        fingerprints: dict[str, str] = self.record["dataset"]["fingerprints"]
        return fingerprints

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        name: str = self.record["dataset"]["name"]
        return name

    @property
    def system(self) -> str:
        """The method that was trained, as the paper's tables know it."""
        name: str = self.config["name"]
        return name

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            NotFoundError: the run has none yet.
            UserError: the file is damaged.
        """
        if not self.results_file.is_file():
            raise NotFoundError(
                f"{self.path} has no results.json: let the training end (the same command goes "
                f"on), or evaluate its last checkpoint with python -m mros_jax.evaluate --run "
                f"{self.path} --out {self.results_file}"
            )
        return read_results(self.results_file)

    @property
    def rankings(self) -> list[dict[str, Any]]:
        """The evaluated rankings, the plain one first."""
        rankings: list[dict[str, Any]] = self.results["results"]
        return rankings

    @functools.cached_property
    def _metrics(self) -> list[dict[str, Any]]:
        return read_records(self.metrics_file)

    @property
    def train_records(self) -> list[dict[str, Any]]:
        """Records of the training steps."""
        return [record for record in self._metrics if record["kind"] == "train"]

    @property
    def eval_records(self) -> list[dict[str, Any]]:
        """Records of the evaluations."""
        return [record for record in self._metrics if record["kind"] == "eval"]

    @functools.cached_property
    def timing(self) -> list[dict[str, Any]]:
        """Wall-clock records."""
        return read_records(self.timing_file, kind=False)

    @functools.cached_property
    def features(self) -> dict[str, np.ndarray] | None:
        """The descriptors that results.json was made of; None where they are not there."""
        protocol = self.rankings[0]["protocol"]
        path = self.features_file(
            self.dataset,
            self.fingerprints,
            flip_test=bool(protocol.get("flip_test")),
            crops=protocol.get("crops") or "none",
        )
        return descriptors.load_features(path) if path.is_file() else None

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch, from the log."""
        ends = (record["step"] for record in self.train_records if record["epoch"] == 1)
        return next(ends, max(len(self.train_records), 1))

    def check_free(self, config: ConfigDict) -> None:
        """Refuse a directory in which a run of `config` cannot be started or resumed.

        Nothing is written.

        Raises:
            UserError: another process has it, it belongs to a run of another config (names the
                differences), it is something else, or it cannot be written.
        """
        parent = self.path
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            raise UserError(f"--workdir {self.path}: {parent} is a file; give another --workdir")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(
                f"--workdir {self.path}: {parent} cannot be written; give another --workdir"
            )
        if not self.path.is_dir():
            return
        lock.check(self._lock_file)
        if self.exists():
            if imported := self.record.get("imported"):
                raise UserError(
                    f"{self.path} was imported from {imported.get('file')} and has nothing to go "
                    f"on from; to start from its network, give another --workdir and "
                    f"--config.init.run={self.path}"
                )
            self._check_config(config)
        elif strangers := [p.name for p in self.path.iterdir() if not _is_stray(p.name)]:
            raise UserError(
                f"{self.path} is not empty and not a run (it holds {sorted(strangers)[0]}); give "
                "another --workdir"
            )

    def _check_config(self, config: ConfigDict) -> None:
        different = _compare(self.config, _resolve(config))
        moved = [line for name, line in different.items() if name in FREE_FIELDS]
        if fixed := [line for name, line in different.items() if name not in FREE_FIELDS]:
            raise UserError(
                f"{self.path} belongs to a run of another config; give another --workdir, or the "
                "same config to resume. Differences (there -> here):\n  " + "\n  ".join(fixed)
            )
        if moved:
            log.info("Going on with other values, which change no result: %s", "; ".join(moved))

    @contextlib.contextmanager
    def claim(self, config: ConfigDict, record: Mapping[str, Any]) -> Iterator[None]:
        """Make the directory this config's run, or resume the one that it is, and lock it.

        Args:
            config: of the run.
            record: of `mros_jax.runs.provenance.describe_run`.

        Raises:
            UserError: as `check_free`; the run was started with other data, from another checkpoint
                or with another arithmetic.
        """
        self.check_free(config)
        self.path.mkdir(parents=True, exist_ok=True)
        with lock.hold(self._lock_file):
            self._check_resumable(config, record)
            record = {"format": FORMAT, **record, "earlier_starts": []}
            if self.exists():
                former = self.record
                start = {key: former[key] for key in ("command", "commit", "started")}
                record["earlier_starts"] = [*former.get("earlier_starts", []), start]
                record["init"] = record["init"] or former.get("init")
            for entry in self.path.iterdir():
                if _TEMPORARY.fullmatch(entry.name):
                    entry.unlink()
            self._write(config, record)
            yield

    def create(self, config: ConfigDict, record: Mapping[str, Any]) -> None:
        """Make a directory that is no run yet this config's; for runs that were trained elsewhere.

        Args:
            config: of the run.
            record: as `claim` takes it, with an entry "imported" that says where it is from.
        """
        self._write(config, {"format": FORMAT, **record, "earlier_starts": []})

    def _write(self, config: ConfigDict, record: Mapping[str, Any]) -> None:
        write_json(self.record_file, record)
        write_json(self.config_file, _resolve(config))
        for name in ("config", "record"):
            self.__dict__.pop(name, None)

    def _check_resumable(self, config: ConfigDict, record: Mapping[str, Any]) -> None:
        """Refuse to resume with other data, init or arithmetic than the run was started with."""
        if not self.exists():
            return
        self._check_config(config)
        former = self.record
        ours, theirs = record["dataset"], former["dataset"]
        for split, fingerprint in ours["fingerprints"].items():
            if theirs["fingerprints"].get(split) != fingerprint:
                sizes = [data.get(f"num_{split}") for data in (theirs, ours)]
                raise UserError(
                    f"{self.path} was started with other {split} images of {ours['name']}: "
                    f"{sizes[0]} then, {sizes[1]} now, and names, labels or pixels differ. Give "
                    "back the data that it was started with, or another --workdir"
                )
        if record["init"] and record["init"] != former.get("init"):
            there, here = former.get("init") or {}, record["init"]
            raise UserError(
                f"{self.path} was started from the checkpoint {there.get('checkpoint_id')} of "
                f"{there.get('run')}; config.init is {here['checkpoint_id']} of {here['run']} now. "
                "Give another --workdir"
            )
        changed = _compare(former.get("arithmetic", {}), record["arithmetic"])
        if changed:
            raise UserError(
                f"{self.path} was started with another arithmetic of JAX, and would not go on "
                "exactly; set it back, or give another --workdir. Differences (there -> here):\n  "
                + "\n  ".join(changed.values())
            )
        for line in _compare(former.get("versions") or {}, record["versions"]).values():
            log.warning("Going on with another version than before: %s", line)

    @property
    def _lock_file(self) -> pathlib.Path:
        return self.path / ".lock"


def read_records(path: pathlib.Path, *, kind: bool = True) -> list[dict[str, Any]]:
    """The records of a run's log.

    Args:
        path: the file.
        kind: whether each record has a kind.

    Raises:
        UserError: a line is no record; names it.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        whole = isinstance(record.get("step"), int)
        if not whole or (kind and record.get("kind") not in ("train", "eval")):
            raise UserError(f"{path}, line {number} is no record of a run: {str(record)[:80]}")
    return records


def _is_stray(name: str) -> bool:
    return bool(_TEMPORARY.fullmatch(name)) or any(fnmatch.fnmatch(name, p) for p in _STRAY_FILES)


def _resolve(config: ConfigDict) -> dict[str, Any]:
    resolved: dict[str, Any] = json.loads(config.to_json())
    return resolved


def _compare(there: Any, here: Any) -> dict[str, str]:
    """Dotted name -> "name: there -> here" of what differs between two trees."""
    found: dict[str, str] = {}

    def walk(there: Any, here: Any, name: str) -> None:
        if isinstance(there, dict) and isinstance(here, dict):
            for key in sorted(there.keys() | here.keys()):
                old, new = (tree.get(key, "(absent)") for tree in (there, here))
                walk(old, new, f"{name}.{key}".strip("."))
        elif there != here:
            found[name] = f"{name}: {there!r} -> {here!r}"

    walk(there, here, "")
    return found

"""What a run directory holds, read for the report."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from mros_jax.files import read_jsonl
from mros_jax.retrieval import descriptors


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a finished run.

    Attributes:
        path: its directory.
        config: `config.json`.
        provenance: `run.json`; its keys are None where there is none.
        results: `results.json`.
        train: records of the training steps.
        evals: records of the evaluations.
        timing: wall-clock records.
        features: `features.npz`; None where there is none.
    """

    path: pathlib.Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    results: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    features: dict[str, np.ndarray] | None

    @property
    def rankings(self) -> list[dict[str, Any]]:
        """The evaluated rankings, the plain one first."""
        return self.results["results"]

    @property
    def system(self) -> str:
        """Name of the system, as the paper's tables have it."""
        return self.config["name"]

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.results["dataset"]["name"] or self.config["dataset"]["name"]

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch, from the log."""
        first = [record["step"] for record in self.train if record["epoch"] == 0]
        return max(first, default=1)


def load_run(path: str | os.PathLike) -> Run:
    """Read a run directory.

    Raises:
        FileNotFoundError: not a run, or one that has not been evaluated.
        ValueError: `features.npz` is incomplete.
    """
    path = pathlib.Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is not a run: it has no config.json; give the --workdir of a training run"
        )
    if not (path / "results.json").is_file():
        raise FileNotFoundError(
            f"{path} has no results.json: let the training end (the same command goes on), or "
            f"evaluate its last checkpoint with python -m mros_jax.evaluate --checkpoint {path}"
        )

    def read(name: str) -> Any:
        return json.loads((path / name).read_text())

    unknown = dict.fromkeys(("command", "commit", "started", "devices", "platform"))
    unknown |= {"versions": None, "dataset": None}
    metrics = read_jsonl(path / "metrics.jsonl")
    has_features = (path / "features.npz").is_file()
    return Run(
        path=path,
        config=read("config.json"),
        provenance=unknown | (read("run.json") if (path / "run.json").is_file() else {}),
        results=read("results.json"),
        train=[record for record in metrics if record["kind"] == "train"],
        evals=[record for record in metrics if record["kind"] == "eval"],
        timing=read_jsonl(path / "timing.jsonl"),
        features=descriptors.load_features(path / "features.npz") if has_features else None,
    )

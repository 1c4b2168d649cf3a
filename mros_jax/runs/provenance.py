"""Where a result comes from: commit, versions, devices, command."""

import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from mros_jax import __version__
from mros_jax.data.splits import Dataset

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def get_commit() -> str | None:
    """The commit of this project's checkout, "-dirty" where files differ; None if not in git."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package inside somebody else's checkout
        return None

    def git(*args: str) -> str:
        # A checkout of another user's, as in containers: git is only asked what is there.
        safe = ("-c", f"safe.directory={root}", "-c", "core.fsmonitor=false")
        return subprocess.run(
            ("git", *safe, "-C", str(root), *args), check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_arithmetic() -> dict[str, Any]:
    """What of JAX's settings changes numbers: types, random generator, precision of products."""
    names = (
        "enable_x64",
        "default_prng_impl",
        "threefry_partitionable",
        "default_matmul_precision",
    )
    return {name: getattr(jax.config, f"jax_{name}") for name in names}


def describe_run(
    dataset: Dataset, fingerprints: Mapping[str, str], *, init: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `run.json` says of this start: process, arithmetic, data set.

    Args:
        dataset: that is trained and evaluated on.
        fingerprints: of its splits.
        init: the checkpoint of another run that this one starts from; None where there is none, or
            where this start goes on from a checkpoint of its own.
    """
    return {
        **describe(),
        "arithmetic": describe_arithmetic(),
        "init": None if init is None else dict(init),
        "dataset": {
            "name": dataset.name,
            "num_classes": dataset.num_classes,
            **{f"num_{split.name}": len(split) for split in dataset.splits},
            "fingerprints": dict(fingerprints),
        },
    }


def describe() -> dict[str, Any]:
    """Command, commit, versions, devices and start time of this process."""
    return {
        "command": shlex.join([pathlib.Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": get_commit(),
        "versions": {
            "mros_jax": __version__,  # of a clone that was not installed, too
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "platform": platform.platform(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

"""What would keep a campaign from its end, found before it begins; and what it will take."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax.campaign.costs import Cost, count_passes
from mros_jax.campaign.evaluations import Protocol, list_protocols
from mros_jax.campaign.jobs import Job
from mros_jax.campaign.systems import System
from mros_jax.data.datasets import records, sources
from mros_jax.data.examination import examine, to_text
from mros_jax.errors import UserError
from mros_jax.models.torch_weights import read_state_dict
from mros_jax.runs.tables import format_grid
from mros_jax.training.recipe import IMAGENET_WEIGHTS, find_weights


def find_problems(systems: Sequence[System], jobs: Sequence[Job]) -> list[str]:
    """Everything that is wrong with data, weights and run directories.

    Args:
        systems: all on one data set.
        jobs: their trainings.
    """
    trained = [system for system in systems if any(job.system == system for job in jobs)]
    return [*_check_data(systems), *_check_weights(trained), *_check_directories(jobs)]


def _check_data(systems: Sequence[System]) -> list[str]:
    """Look at every image, once for all systems."""
    configs = [system.read() for system in systems]
    data = configs[0].dataset
    batches = [config.batch for config in configs]
    try:
        dataset = sources.load_dataset(
            data.name, data.root, on_bad_image="skip", **records.pick_options(data.to_dict())
        )
        report = examine(
            dataset,
            identities=max((batch.get("identities", 1) for batch in batches), default=1),
            images=max((batch.get("images", 1) for batch in batches), default=1),
            on_bad_image=data.on_bad_image,
            input_size=(configs[0].input.height, configs[0].input.width),
            cache_dir=data.cache_dir,
        )
    except (OSError, UserError) as error:
        return [f"data: {error}"]
    found = [finding for finding in report.findings if finding.level in ("fatal", "error")]
    return [f"data: {to_text(finding)}" for finding in found]


def _check_weights(systems: Sequence[System]) -> list[str]:
    """Look for and into every file of ImageNet weights that a system starts from."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for system in systems:
        config = system.read()
        if config.weights != "none" and config.init.run is None:
            key = (config.weights, config.network.get("trunk", ""))
            wanted.setdefault(key, []).append(system.name)
    problems = []
    for (weights, trunk), names in wanted.items():
        users = f"(for {', '.join(names)})"
        file = find_weights(trunk) if weights == "auto" else pathlib.Path(weights)
        if file is None:
            fetched = list(IMAGENET_WEIGHTS.get(trunk, ()))
            way = f"python -m mros_jax.fetch_weights {fetched[0]}, or " if fetched else ""
            problems.append(
                f"weights: none for {trunk} {users}; {way}--config.weights=FILE with torchvision's "
                "file; --config.weights=none starts at random, far below what was published"
            )
            continue
        try:
            read_state_dict(file)
        except UserError as error:
            problems.append(f"weights: {error} {users}")
    return problems


def _check_directories(jobs: Sequence[Job]) -> list[str]:
    """Look whether each run can be started or resumed where it is to be."""
    problems = []
    for job in jobs:
        try:
            job.is_complete()
        except UserError as error:
            problems.append(f"{job.name}: {error}")
    return problems


def format_estimate(
    systems: Sequence[System],
    jobs: Sequence[Job],
    costs: Mapping[str, Cost],
    paper: Mapping[str, Any],
) -> str:
    """What is left to do, how long it will take and how much memory, as measured.

    Args:
        systems: that take part.
        jobs: theirs.
        costs: name of the system -> what was measured of it.
        paper: for the protocols that each is evaluated with.
    """
    rows = [("system", "runs left", "training images/s", "a run", "evaluations", "memory", "all")]
    total, memory = 0.0, 0
    for system in systems:
        cost = costs[system.name]
        own = [job for job in jobs if job.system == system]
        left = [job for job in own if not job.is_complete()]
        extra = _foretell(list_protocols(system.name, paper), cost, system)
        seconds = len(left) * (cost.run_seconds + extra)
        total += seconds
        peak = cost.host_bytes if cost.device_bytes is None else cost.device_bytes
        memory = max(memory, peak)
        rows.append(
            (
                system.name,
                f"{len(left)} of {len(own)}",
                f"{cost.train_speed:.0f}",
                format_time(cost.run_seconds),
                format_time(extra),
                f"{peak / 1e9:.2f} GB",
                format_time(seconds),
            )
        )
    devices = " and ".join(sorted({cost.device for cost in costs.values()}))
    return (
        f"{format_grid(rows)}\n\nOn {devices}: {format_time(total)} in all, and "
        f"{memory / 1e9:.2f} GB of memory, as measured on a few real steps of each system. "
        "Re-ranking comes on top of it."
    )


def _foretell(protocols: Sequence[Protocol], cost: Cost, system: System) -> float:
    """Seconds of the evaluations that training does not do itself, without their re-ranking.

    Descriptors are kept, and re-rankings of one protocol share its process: each is made once.
    """
    own = system.read().eval
    plain = {protocol.plain for protocol in protocols}
    made = {(p.flip_test, p.crops) for p in plain} - {(own.flip_test, own.crops)}
    passes = sum(count_passes(*way) for way in made)
    extraction = cost.test_images * cost.extract_seconds * passes / cost.passes
    return len(plain) * cost.rank_seconds + extraction


def format_time(seconds: float) -> str:
    """In seconds, minutes, hours or days, whichever says it in few digits."""
    for name, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} s"

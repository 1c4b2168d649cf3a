"""The same run under several protocols, each evaluated once and kept."""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax.campaign.imported import Imported
from mros_jax.campaign.jobs import Job, Ledger, Runner, run_step
from mros_jax.campaign.systems import System
from mros_jax.errors import UserError
from mros_jax.runs import paper as papers
from mros_jax.runs.results import read_results

log = logging.getLogger(__name__)

Entry = Mapping[str, Any]  # a ranking of results.json


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a run's descriptors are made and ranked.

    Attributes:
        ap: "standard" or "trapezoid".
        flip_test: mean of image and mirror image.
        crops: "none" or "ten".
        normalize: divide descriptors by their norm.
        metric: "cosine" or "euclidean"; None: the run's own.
        rerank: method; None: none.
        options: of the method, as JSON.
    """

    ap: str
    flip_test: bool
    crops: str
    normalize: bool
    metric: str | None = None
    rerank: str | None = None
    options: str = "{}"

    @classmethod
    def of(
        cls, paper: Mapping[str, Any], table: Mapping[str, Any], row: Mapping[str, Any]
    ) -> "Protocol":
        """That of a row of `mros_jax/runs/paper_results.toml`."""
        fields = {**paper["protocol"], **row.get("protocol", {})}
        return cls(
            ap=fields["ap"],
            flip_test=fields["flip_test"],
            crops=fields["crops"],
            normalize=fields["normalize"],
            metric=fields.get("metric"),
            rerank=table.get("rerank"),
            options=json.dumps(table.get("rerank_options", {})),
        )

    def fits(self, entry: Entry) -> bool:
        """Whether a ranking was measured so."""
        found = entry["protocol"]
        own = dataclasses.asdict(self)
        options = json.loads(own.pop("options"))
        used = found.get("rerank_options") or {}
        return all(value is None or found[key] == value for key, value in own.items()) and (
            entry["rerank"] == self.rerank
            and all(used.get(key) == value for key, value in options.items())
        )

    @property
    def plain(self) -> "Protocol":
        """The same without re-ranking."""
        return dataclasses.replace(self, rerank=None, options="{}")

    @property
    def words(self) -> list[str]:
        """The arguments of `mros_jax.evaluate` for it, but for its re-ranking."""
        words = [
            f"--ap={self.ap}",
            "--flip_test" if self.flip_test else "--no-flip_test",
            f"--crops={self.crops}",
            "--no-unnormalized" if self.normalize else "--unnormalized",
        ]
        if self.metric is not None:
            words.append(f"--metric={self.metric}")
        return words

    @property
    def name(self) -> str:
        """In the name of a file, but for its re-ranking."""
        words = [self.ap, "flip" * self.flip_test, "tencrops" * (self.crops == "ten")]
        words += ["raw" * (not self.normalize), self.metric or ""]
        return "-".join(filter(None, words))


def list_common(paper: Mapping[str, Any]) -> dict[str, Protocol]:
    """The protocol that all systems are compared on: MROS's, plain and with its ECN."""
    reranked = next(table for table in paper["table"] if table.get("rerank") == "ecn")
    row = {"protocol": {"metric": "cosine"}}
    return {"plain": Protocol.of(paper, {}, row), "ecn": Protocol.of(paper, reranked, row)}


def list_protocols(system: str, paper: Mapping[str, Any]) -> list[Protocol]:
    """Those that a system was published with, and the common one."""
    published = [Protocol.of(paper, *pair) for pair in papers.find_rows(system, paper)]
    return list(dict.fromkeys([*published, *list_common(paper).values()]))


class Evaluations:
    """The rankings of a run: of its training, and those that were asked for later.

    Attributes:
        run: the run, which is complete.

    Args:
        job: whose run it is.
    """

    def __init__(self, job: Runner):
        self._job = job
        self.run = job.run
        self._folder = job.folder / "evaluations" / job.name

    @functools.cached_property
    def _entries(self) -> list[Entry]:
        trained = self.run.results_file.is_file()  # and not imported
        entries: list[Entry] = list(self.run.rankings) if trained else []
        for path in sorted(self._folder.glob("*.json")):
            try:
                results = read_results(path)
            except UserError as error:
                log.warning("%s is left out, and made again: %s", path, error)
                continue
            if not trained or results["run"]["step"] == self.run.results["run"]["step"]:
                entries += results["results"]
        return entries

    def find(self, protocol: Protocol) -> Entry | None:
        """The ranking of a protocol; None where the run was not evaluated so."""
        return next((entry for entry in self._entries if protocol.fits(entry)), None)

    def evaluate(self, protocols: Sequence[Protocol], ledger: Ledger) -> bool:
        """Evaluate the run under each protocol that it was not evaluated under yet.

        Those that differ in re-ranking only are evaluated by one process.

        Returns:
            Whether there is a ranking of each now.
        """
        missing = [protocol for protocol in protocols if self.find(protocol) is None]
        for plain in dict.fromkeys(protocol.plain for protocol in missing):
            wanted = [p for p in missing if p.plain == plain]
            options = {p.rerank: json.loads(p.options) for p in wanted if p.rerank is not None}
            path = self._folder / f"{'-'.join([plain.name, *options])}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("%s: %s", self._job.name, path.stem)
            words = ["mros_jax.evaluate", f"--run={self._job.run.path}", f"--out={path}"]
            words += ["--no_progress", *plain.words]
            if options:
                words.append(f"--rerank={','.join(options)}")
                words.append(f"--rerank_options={json.dumps(options)}")
            name = f"{self._job.name} {path.stem}"
            if failure := run_step(self._job, name, words, ledger):
                log.warning("%s could not be evaluated: %s", self._job.name, failure)
        self.__dict__.pop("_entries", None)
        return all(self.find(protocol) is not None for protocol in protocols)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A system with what there is of it.

    Attributes:
        label: what it is called in tables.
        system: its name in `mros_jax/runs/paper_results.toml`.
        made: seed -> what there is of its run; "-" for one that was trained elsewhere.
        changes: why it is another than the system of that name; empty: it is that.
    """

    label: str
    system: str
    made: Mapping[str, Evaluations]
    changes: tuple[str, ...] = ()

    def find(self, protocol: Protocol) -> dict[str, Entry]:
        """Seed -> its ranking under a protocol, where there is one."""
        found = {seed: made.find(protocol) for seed, made in self.made.items()}
        return {seed: entry for seed, entry in found.items() if entry is not None}

    def evaluate(self, paper: Mapping[str, Any], ledger: Ledger) -> bool:
        """Evaluate its runs under all of its system's protocols; whether all could be."""
        protocols = list_protocols(self.system, paper)
        evaluated = [made.evaluate(protocols, ledger) for made in self.made.values()]
        return all(evaluated)


def collect(
    systems: Sequence[System],
    jobs: Sequence[Job],
    ledger: Ledger,
    weights: Sequence[Imported] = (),
) -> list[Contestant]:
    """All systems with their complete runs, and then checkpoints that were imported.

    Args:
        systems: that are trained.
        jobs: theirs.
        ledger: of the folder.
        weights: checkpoints of peers.
    """
    found = []
    for system in systems:
        made = {}
        for job in jobs:
            try:
                if job.system == system and ledger.failure(job.name) is None and job.is_complete():
                    made[str(job.seed)] = Evaluations(job)
            except UserError as error:
                log.warning("%s is left out: %s", job.name, error)
        found.append(Contestant(system.name, system.name, made, system.list_changes()))
    for one in weights:
        if one.run.exists():
            label = f"{one.run.system} of {one.peer} ({one.file.name})"
            found.append(Contestant(label, one.run.system, {"-": Evaluations(one)}))
    return found

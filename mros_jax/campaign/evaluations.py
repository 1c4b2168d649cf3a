"""The same run under several protocols, each evaluated once and kept."""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mros_jax.campaign.jobs import Job, Ledger, run_step
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
    """The rankings of a job's run: of its training, and those that were asked for later.

    Args:
        job: whose run is complete.
    """

    def __init__(self, job: Job):
        self._job = job
        self._folder = job.folder / "evaluations" / job.name

    @functools.cached_property
    def _entries(self) -> list[Entry]:
        entries: list[Entry] = list(self._job.run.rankings)
        step = self._job.run.results["run"]["step"]
        for path in sorted(self._folder.glob("*.json")):
            try:
                results = read_results(path)
            except UserError as error:
                log.warning("%s is left out, and made again: %s", path, error)
                continue
            if results["run"]["step"] == step:
                entries += results["results"]
        return entries

    def find(self, protocol: Protocol) -> Entry | None:
        """The ranking of a protocol; None where the run was not evaluated so."""
        return next((entry for entry in self._entries if protocol.fits(entry)), None)

    def evaluate(self, protocols: Sequence[Protocol], ledger: Ledger) -> None:
        """Evaluate the run under each protocol that it was not evaluated under yet.

        Those that differ in re-ranking only are evaluated by one process.
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


def collect(jobs: Sequence[Job], ledger: Ledger) -> dict[str, Evaluations]:
    """What there is of every complete job, by its name."""
    made = {}
    for job in jobs:
        try:
            if ledger.failure(job.name) is None and job.is_complete():
                made[job.name] = Evaluations(job)
        except UserError as error:
            log.warning("%s is left out: %s", job.name, error)
    return made


def evaluate(jobs: Sequence[Job], ledger: Ledger, paper: Mapping[str, Any]) -> None:
    """Evaluate every complete job under all of its system's protocols."""
    made = collect(jobs, ledger)
    for job in jobs:
        if job.name in made:
            made[job.name].evaluate(list_protocols(job.system.name, paper), ledger)

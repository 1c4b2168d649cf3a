"""Checkpoints that other code has trained, as runs that are evaluated beside our own."""

import dataclasses
import pathlib
from collections.abc import Sequence

from mros_jax.campaign.jobs import Ledger, run_step
from mros_jax.errors import UserError
from mros_jax.files import find_sha256
from mros_jax.peers import PEERS
from mros_jax.runs.run import Run


@dataclasses.dataclass(frozen=True)
class Imported:
    """A checkpoint of a peer.

    Attributes:
        peer: a key of `mros_jax.peers.PEERS`.
        file: the checkpoint.
        folder: of the campaign.
    """

    peer: str
    file: pathlib.Path
    folder: pathlib.Path

    @property
    def name(self) -> str:
        """Of its run, and in the ledger."""
        return f"{self.peer}-{self.file.stem}"

    @property
    def run(self) -> Run:
        """Its run, which may not be there yet."""
        return Run(self.folder / "imported" / self.name)


def read_weights(words: Sequence[str], folder: pathlib.Path) -> tuple[Imported, ...]:
    """Read `PEER=FILE` words.

    Raises:
        UserError: one is something else, names a peer that is none, or two have one name.
    """
    found: dict[str, Imported] = {}
    for word in words:
        peer, _, file = word.partition("=")
        if peer not in PEERS or not file:
            raise UserError(f"--weights {word}: expected PEER=FILE, PEER one of {', '.join(PEERS)}")
        one = Imported(peer, pathlib.Path(file).absolute(), folder.absolute())
        if one.name in found:
            raise UserError(f"--weights {word}: there is another of the name {one.name}; rename it")
        found[one.name] = one
    return tuple(found.values())


def import_all(weights: Sequence[Imported], words: Sequence[str], ledger: Ledger) -> list[str]:
    """Make runs of checkpoints, where they are none yet; what is wrong with the others.

    Args:
        weights: the checkpoints.
        words: `--config.FIELD=VALUE` that say where the data are.
        ledger: of the folder.
    """
    problems = []
    for one in weights:
        if not one.file.is_file():
            problems.append(f"weights: {one.file} does not exist")
        elif one.run.exists():
            if one.run.record["imported"]["sha256"] != find_sha256(one.file):
                problems.append(
                    f"weights: {one.run} was made of another {one.file.name}; remove it"
                )
        else:
            command = ["mros_jax.import_weights", f"--from={one.peer}", str(one.file)]
            command += [f"--out={one.run.path}", *words]
            if failure := run_step(one, f"{one.name} import", command, ledger):
                problems.append(f"weights: {failure}")
    return problems

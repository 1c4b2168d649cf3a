"""Start from another run: its network's variables, as far as they fit."""

import dataclasses
import logging
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from mros_jax.errors import NotFoundError, UserError
from mros_jax.inference import make_checkpoint_id
from mros_jax.runs.checkpoints import describe_difference, load_variables
from mros_jax.runs.run import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """A network's variables in a checkpoint.

    Attributes:
        run: the run's directory.
        checkpoint_id: names the weights, see `mros_jax.inference.make_checkpoint_id`.
        variables: parameters and running statistics, the moving average's where the run had one.
    """

    run: str
    checkpoint_id: str
    variables: dict[str, Any]

    def describe(self) -> dict[str, str]:
        """What `run.json` says of it."""
        return {"run": self.run, "checkpoint_id": self.checkpoint_id}

    def fill(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Another network's variables, replaced by those here of the same path and shape.

        Raises:
            UserError: there are none.
        """
        here = traverse_util.flatten_dict(variables)
        there = traverse_util.flatten_dict(self.variables)
        taken = {
            path: there[path]
            for path, value in here.items()
            if path in there and np.shape(there[path]) == np.shape(value)
        }
        difference = describe_difference(self.variables, variables)
        if not taken:
            raise UserError(
                f"nothing in the network of {self.run} has a name and shape of this one's: "
                f"{difference}; give another run (config.init.run)"
            )
        log.info(
            "%d of %d arrays of the network start from %s, checkpoint %s",
            len(taken),
            len(here),
            self.run,
            self.checkpoint_id,
        )
        if len(taken) < len(here):
            log.info("The others start without it: %s", difference)
        filled: dict[str, Any] = traverse_util.unflatten_dict({**here, **taken})
        return filled


def load_source(section: ConfigDict) -> Source | None:
    """Read what a config's `init` section names; None where it names no run.

    Raises:
        NotFoundError: it is no run, or has no such checkpoint.
        UserError: the run or its checkpoint is damaged.
    """
    if section.run is None:
        return None
    try:
        run = Run.open(section.run)
        variables, step = load_variables(run.checkpoints, section.checkpoint)
    except NotFoundError as error:
        raise NotFoundError(f"config.init.run: {error}") from error
    checkpoint_id = make_checkpoint_id(section.checkpoint, step, variables)
    return Source(str(run.path.absolute()), checkpoint_id, variables)

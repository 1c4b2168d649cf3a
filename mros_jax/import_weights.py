"""Make a run of a checkpoint that other public code has trained.

    python -m mros_jax.import_weights --from strong-baseline market_resnet50.pth --out runs/bot \
        --config.dataset.root=PATH/TO/Market-1501-v15.09.15
    python -m mros_jax.evaluate --run runs/bot --out runs/bot/results.json

The run is evaluated, extracted, indexed, exported and reported as any other; it has the config of
the same system here, with what the other code does otherwise. docs/import.md says what is read.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mros_jax import config as configs
from mros_jax import console
from mros_jax.data import augment
from mros_jax.errors import UserError, check_choice
from mros_jax.files import find_sha256, make_directory_atomically
from mros_jax.models import torch_weights
from mros_jax.models.outputs import Network
from mros_jax.peers import PEERS, Plan
from mros_jax.runs import provenance
from mros_jax.runs.checkpoints import Checkpoints
from mros_jax.runs.run import Run


def import_run(
    path: str | os.PathLike[str],
    *,
    peer: str,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
) -> Run:
    """Make a run directory of a peer's checkpoint; all of it or nothing.

    Args:
        path: the checkpoint, as its code saved it.
        peer: a key of `mros_jax.peers.PEERS`.
        out: the run's directory, which is made; or an empty one.
        overrides: fields of the config that are to be others, as on a command line:
            "--config.dataset.root=DIR", "--config.network.pooling=max".

    Raises:
        NotFoundError: no such file.
        UserError: a damaged file, another code's or one with layers that no network here has;
            tensors missing, unexpected or misshapen; a field that the config does not have; or a
            directory that holds something.
    """
    check_choice("peer", peer, PEERS)
    path, out = pathlib.Path(path), pathlib.Path(out)
    _check_free(out)
    plan = _make_plan(path, peer, torch_weights.read_state_dict(path))
    config = _make_config(plan, overrides)
    network = configs.make_network(config, plan.num_classes)
    variables = torch_weights.from_foreign_state_dict(
        plan.state,
        _shape_variables(config, network),
        plan.name_of,
        source=f"{path}, as a checkpoint of {peer},",
    )
    record = {
        **provenance.describe(),
        "arithmetic": provenance.describe_arithmetic(),
        "init": None,
        "imported": {"from": peer, "file": path.name, "sha256": find_sha256(path)},
        "dataset": {
            "name": config.dataset.name,
            "num_classes": plan.num_classes,
            "fingerprints": dict.fromkeys(("train", "query", "gallery"), ""),
        },
    }
    with make_directory_atomically(out) as directory:
        saved = Checkpoints(Run(directory).checkpoints)
        saved.save_model(variables)
        saved.close()
        Run(directory).create(config, record)
    return Run.open(out)


def _check_free(out: pathlib.Path) -> None:
    if out.is_dir() and (held := sorted(entry.name for entry in out.iterdir())):
        raise UserError(f"--out {out} is not empty (it holds {held[0]}); give another directory")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")


def _make_plan(path: pathlib.Path, peer: str, state: torch_weights.StateDict) -> Plan:
    known = PEERS[peer]
    if missing := known.find_missing(state):
        others = [f"--from {name}" for name, other in PEERS.items() if other.knows(state)]
        raise UserError(
            f"{path} is no checkpoint of {peer} ({known.repository}): no tensor is called "
            f"{' or '.join(missing)}; it holds {len(state)}: {', '.join(sorted(state)[:6])}, ... "
            + (f"It may be one for {' or '.join(others)}" if others else "")
        )
    try:
        return known.plan(state)
    except UserError as error:
        raise UserError(f"{path} of {peer}: {error}") from error
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise UserError(
            f"{path} is not a whole checkpoint of {peer} ({known.repository}): "
            f"{type(error).__name__} {error}; download it again"
        ) from error


def _make_config(plan: Plan, overrides: Sequence[str]) -> ConfigDict:
    file, _, variant = plan.config.partition(":")
    config = configs.read(file, variant or None)
    with config.unlocked():
        config.weights = "none"
        for name, value in plan.changes.items():
            section, _, field = name.rpartition(".")
            (configs.get_field(config, section) if section else config)[field] = value
    configs.apply_overrides(config, overrides)
    return config


def _shape_variables(config: ConfigDict, network: Network) -> dict[str, Any]:
    """Shapes of the network's variables, by way of an image as it is tested."""
    stored = jax.ShapeDtypeStruct((1, 128, 64, 3), np.uint8)

    def init(key: jax.Array, images: jax.Array) -> Any:
        inputs = augment.preprocess(
            images,
            height=config.input.height,
            width=config.input.width,
            interpolation=config.input.interpolation,
            **configs.find_normalization(config),
        )
        return network.init(key, inputs, train=False)

    shapes: dict[str, Any] = jax.eval_shape(init, jax.random.key(0), stored)
    return shapes


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    overrides, rest = configs.split_overrides(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.import_weights",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="--config.FIELD=VALUE sets a field of the config, as in --config.dataset.root=DIR",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint of a peer")
    parser.add_argument(
        "--from", dest="peer", required=True, choices=PEERS, help="the code that trained it"
    )
    parser.add_argument("--out", metavar="RUN", required=True, help="directory of the run to make")
    return parser.parse_args(rest), overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args, overrides = _parse(argv)
    run = import_run(args.file, peer=args.peer, out=args.out, overrides=overrides)
    identities = f"{run.num_classes} identities" if run.num_classes else "no classifier"
    print(f"{run}: {run.system} on {run.dataset}, {identities}, from {args.file}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))

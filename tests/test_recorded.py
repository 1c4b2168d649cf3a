"""Every system against what its PyTorch network computed: `python -m tests.parity.record`.

Weights and images are drawn by NumPy on both sides, and all is float64: evaluation, losses, every
gradient, and what a few steps of the optimizer change.
"""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from mros_jax.models import torch_weights
from tests.parity.common import (
    CONFIGS,
    HEIGHT,
    LABELS,
    WIDTH,
    make_images,
    make_ours,
    read_stage,
    train_ours,
)
from tests.recorded import SYSTEMS, compare, digest, draw, load_system

STEPS = 3
RECORDED = sorted(path.stem for path in SYSTEMS.glob("*.npz"))
QUICK = {"mros-IV", "pcb"}  # others take as long, and there are many
QUICK_FIRST = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECORDED
]


def read_case(case):
    """The config that a recording is of."""
    config = read_stage(case["file"], case["variant"], case["stage"])
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in case["changes"].items()}
    config.network.update(changes)
    return config


def make_batches():
    return [make_images(len(LABELS), HEIGHT, WIDTH, seed=i).astype(float) for i in range(STEPS)]


def name_outputs(outputs):
    return {
        "descriptor": outputs.descriptor,
        **{f"embeddings/{name}": x for name, x in outputs.embeddings.items()},
        **{f"logits/{name}": x for name, x in outputs.logits.items()},
    }


def split_tensors(named, kind):
    """Tensors by PyTorch's name; running statistics are no gradients."""
    return {
        f"{'statistics' if 'running_' in name else kind}/{name}": value
        for name, value in named.items()
        if not name.endswith("num_batches_tracked")
    }


def compute(config, idle):
    """All that is recorded of a system, by its name in the table; without steps of `idle`."""
    ours = make_ours(config, draw)
    batches = make_batches()
    evaluate = jax.jit(functools.partial(ours.ours.apply, train=False))
    outputs = name_outputs(evaluate(ours.variables, batches[0]))
    variables, own, first = train_ours(ours, batches)
    (total, (terms, _, stats)), (grads, own_grads) = first
    tensors = torch_weights.to_torch_state_dict({"params": grads, "batch_stats": stats})
    before, after = map(torch_weights.to_torch_state_dict, (ours.variables, variables))
    flatten = functools.partial(traverse_util.flatten_dict, sep="/")
    own_before, own_grads = flatten(ours.own), flatten(own_grads)
    changes = {name: after[name] - before[name] for name in after}
    table = {
        **{f"evaluation/{name}": value for name, value in outputs.items()},
        "loss/total": total,
        **{f"loss/terms/{name}": value for name, value in terms.items()},
        **split_tensors(tensors, "gradients"),
        **{f"gradients/{name}": value for name, value in own_grads.items()},
        **{f"steps/{name}": value for name, value in changes.items()},
        **{f"steps/{name}": own[name] - own_before[name] for name in own},
    }
    return {
        name: digest(name, value)
        for name, value in table.items()
        if not name.endswith("num_batches_tracked") and name.removeprefix("steps/") not in idle
    }


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_numbers_are_pytorchs(name):
    case, theirs = load_system(name)
    with jax.enable_x64(True):
        compare(compute(read_case(case), case["idle"]), theirs)


def test_every_system_is_recorded():
    files = {load_system(name)[0]["file"] for name in RECORDED}
    assert files == {path.stem for path in CONFIGS.glob("*.py")} - {"demo"}


def test_a_digest_hides_nothing():
    rng = np.random.default_rng(0)
    value = rng.standard_normal(1000)
    for change in (np.eye(1000)[3], np.ones(1000) / 1000**0.5, rng.permutation(value) - value):
        size = 1e-5 * np.linalg.norm(value) / np.linalg.norm(change)
        moved = np.abs(digest("x", value + size * change) - digest("x", value)).max()
        assert moved > 3e-6 * np.linalg.norm(value)

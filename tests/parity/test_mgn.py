"""MGN against a PyTorch network of its own; see `test_systems`."""

import functools

import jax
import pytest
import torch

from tests.parity import test_systems
from tests.parity.torch_mgn import TorchMGN, make_optimizers, rate, rate_of_public, total_loss

CASES = {
    "mgn": test_systems.Case(
        "mgn",
        "",
        lambda fields, n: TorchMGN(n, fields.trunk),
        total_loss,
        make_optimizers,
        rate,
    ),
    "mgn-public": test_systems.Case(
        "mgn",
        "public",
        lambda fields, n: TorchMGN(n, fields.trunk, public=True),
        functools.partial(total_loss, triplet_weight=2),
        make_optimizers,
        rate_of_public,
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
def test_evaluation(case):
    test_systems.test_evaluation(case)


@each_case
def test_training_step(case, monkeypatch):
    test_systems.test_training_step(case, monkeypatch)


@each_case
def test_schedule(case):
    test_systems.test_schedule(case)


@each_case
def test_five_steps_in_float64(case):
    test_systems.test_five_steps_in_float64(case)


def test_training_step_of_resnet50(monkeypatch):
    """The tiny trunk's tails have no block of layer3."""
    pair = test_systems.make_pair(CASES["mgn"], "resnet50", monkeypatch=monkeypatch)
    test_systems.check_training(pair, 1e-5, 1e-4, torch.float32)
    assert jax.tree.leaves(pair.variables["params"]["tail_part2"]["layer3_5"])

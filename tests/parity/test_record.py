"""What is recorded is what PyTorch computes now: else `python -m tests.parity.record`."""

import json

import pytest

from tests.parity.record import CASES, compute
from tests.recorded import SYSTEMS, compare, load_system


@pytest.mark.parametrize("name", CASES)
def test_recording_is_true(name):
    described, kept = load_system(name)
    case, computed = compute(CASES[name])
    assert described == json.loads(json.dumps(case))
    compare(kept, computed)


def test_no_recording_is_left_over():
    assert {path.stem for path in SYSTEMS.glob("*.npz")} == set(CASES)

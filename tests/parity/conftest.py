"""Live comparisons with PyTorch: all slow, and none without it."""

import pathlib

import pytest

from tests.recorded import TORCH

if TORCH:
    import torch

    torch.set_num_threads(1)  # the test runner's workers fill the cores already
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)

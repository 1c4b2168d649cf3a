"""Lets the tests import the PyTorch model beside them by its file name."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# The test runner's workers fill the cores; waiting for each other costs PyTorch's threads the most.
torch.set_num_threads(1)

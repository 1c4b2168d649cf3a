"""Lets the tests import the PyTorch model beside them by its file name."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

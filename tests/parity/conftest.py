"""One thread for PyTorch: the test runner's workers fill the cores already."""

import torch

torch.set_num_threads(1)

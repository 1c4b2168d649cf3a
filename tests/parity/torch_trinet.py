"""TriNet in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_mros import triplet_loss
from tests.parity.torch_resnet import ResNet


class TorchTriNet(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.trunk = ResNet(layout, last_stride=2)
        # Linear, batch normalization, ReLU; linear.
        self.reduction = nn.Linear(self.trunk.channels[-1], 1024, bias=False)
        self.reduction.add_module("bn", nn.BatchNorm1d(1024))
        self.embedding = nn.Linear(1024, 128)

    def forward(self, x):
        maps = self.trunk(x)
        g = maps["t4"].mean(dim=(2, 3))
        e = self.embedding(F.relu(self.reduction.bn(self.reduction(g))))
        return {
            "descriptor": e,
            "embeddings": {"g": [g], "e": [e]},
            "logits": {},
            "maps": maps,
        }


def total_loss(out, labels, own):
    loss = triplet_loss(out["embeddings"]["e"][0], labels, margin=None)
    return loss, {"triplet": loss}


def make_optimizers(model, own):
    """Optimizers, and whether each follows the schedule."""
    return [(torch.optim.Adam(model.parameters(), lr=3e-4), True)]


def rate_at(step):
    """Share of 3e-4 at a training step."""
    return 1.0 if step <= 15_000 else 0.001 ** ((step - 15_000) / 10_000)

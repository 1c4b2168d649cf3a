"""SphereReID in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Fan et al., "SphereReID: Deep Hypersphere Manifold Embedding for Person Re-Identification", 2019.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_resnet import ResNet


class TorchSphereReID(nn.Module):
    def __init__(self, num_classes, layout):
        super().__init__()
        self.trunk = ResNet(layout, last_stride=2)
        size = self.trunk.channels[-1]
        self.neck = nn.BatchNorm1d(size)
        self.embedding = nn.Linear(size, 1024)
        self.embedding_bn = nn.BatchNorm1d(1024)
        self.classifier = nn.ModuleList([nn.Linear(1024, num_classes, bias=False)])

    def forward(self, x, dropped=None):
        """`dropped` (B, 1, C) is the mask of the dropout, 2 where a number is kept."""
        maps = self.trunk(x)
        g = maps["t4"].mean(dim=(2, 3))
        kept = self.neck(g) if dropped is None else self.neck(g) * dropped[:, 0]
        e = self.embedding_bn(self.embedding(kept))
        cosine = F.linear(F.normalize(e), F.normalize(self.classifier[0].weight))
        return {
            "descriptor": F.normalize(e),
            "embeddings": {"g": [g], "e": [e]},
            "logits": {"e": [14 * cosine]},
            "maps": maps,
        }


def total_loss(out, labels, own):
    loss = F.cross_entropy(out["logits"]["e"][0], labels)
    return loss, {"cross_entropy": loss}


def make_optimizers(model, own):
    """Optimizers, and whether each follows the schedule."""
    return [(torch.optim.Adam(model.parameters(), lr=1e-3), True)]


def rate(epoch):
    """Share of 1e-3 in an epoch, counted from 0: linear from 5e-5, then 1e-4 and 1e-5."""
    if epoch < 20:
        return (5e-5 + (1e-3 - 5e-5) * epoch / 20) / 1e-3
    return 1.0 if epoch < 80 else 0.1 if epoch < 100 else 0.01

"""PCB in PyTorch, written from the paper; shares no code with `mros_jax`.

Sun et al., "Beyond Part Models: Person Retrieval with Refined Part Pooling", ECCV 2018.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_resnet import ResNet

STRIPES, REDUCED = 6, 256


class SharedEmbedding(nn.Linear):
    """One layer, whose normalization sees the stripes as positions of one feature map."""

    def __init__(self, size):
        super().__init__(size, REDUCED, bias=False)
        self.bn = nn.BatchNorm1d(REDUCED)

    def forward(self, stripes):
        y = torch.stack([super(SharedEmbedding, self).forward(g) for g in stripes], dim=2)
        return F.relu(self.bn(y)).unbind(dim=2)


class OwnEmbeddings(nn.Module):
    """A layer with bias and a normalization for each stripe."""

    def __init__(self, size):
        super().__init__()
        for i in range(STRIPES):
            self.add_module(str(i), nn.Linear(size, REDUCED))
        self.bn = nn.ModuleList(nn.BatchNorm1d(REDUCED) for _ in range(STRIPES))

    def forward(self, stripes):
        return [F.relu(self.bn[i](getattr(self, str(i))(g))) for i, g in enumerate(stripes)]


class TorchPCB(nn.Module):
    def __init__(self, num_classes, layout, own=False):
        super().__init__()
        self.own = own
        self.trunk = ResNet(layout)
        size = self.trunk.channels[-1]
        self.embedding = OwnEmbeddings(size) if own else SharedEmbedding(size)
        self.classifier = nn.ModuleList(nn.Linear(REDUCED, num_classes) for _ in range(STRIPES))

    def forward(self, x, dropped=None):
        """`dropped`: what dropout multiplies g by, (B, S, C); None: no dropout."""
        maps = self.trunk(x)
        pooled = F.adaptive_avg_pool2d(maps["t4"], (STRIPES, 1))  # (B, C, S, 1)
        g = [pooled[:, :, i, 0] for i in range(STRIPES)]
        kept = g if dropped is None else [g[i] * dropped[:, i] for i in range(STRIPES)]
        h = self.embedding(kept)
        logits = [fc(x) for fc, x in zip(self.classifier, h, strict=True)]
        described = h if self.own else [F.normalize(x, dim=1) for x in g]
        return {
            "descriptor": torch.cat(tuple(described), dim=1),
            "embeddings": {"g": g, "h": h},
            "logits": {"h": logits},
            "maps": maps,
        }


def total_loss(out, labels, own):
    total = sum(F.cross_entropy(z, labels) for z in out["logits"]["h"])
    return total, {"cross_entropy": total}


def make_optimizers(model, own):
    """One optimizer, which follows the schedule: a tenth of the rate for the trunk."""
    trunk = list(model.trunk.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": trunk, "lr": 0.01}, {"params": rest, "lr": 0.1}]
    sgd = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, nesterov=not model.own)
    return [(sgd, True)]


def rate(epoch):
    return 1.0 if epoch < 40 else 0.1

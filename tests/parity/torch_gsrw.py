"""GSRW in PyTorch, written from what its authors' code computes; shares no code with `mros_jax`.

Shen et al., "Deep Group-Shuffling Random Walk for Person Re-Identification", CVPR 2018. The walk is
the inverse of a matrix here, and each head is a module.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_resnet import ResNet


class Heads(nn.Module):
    def __init__(self, heads, features):
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm1d(features) for _ in range(heads))
        self.classifier = nn.ModuleList(nn.Linear(features, 2) for _ in range(heads))

    def compare(self, j, x, y, mask=None):
        """Two logits of head j for each x with each y."""
        z = (x[:, None, :] - y[None, :, :]) ** 2
        z = self.bn[j](z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return self.classifier[j](z if mask is None else z * mask)


def refine(p2g, g2g, alpha):
    size = len(g2g)
    steps = g2g.detach()[:, :, 1].clone()
    steps.fill_diagonal_(-torch.inf)
    step = torch.softmax(steps, dim=1)
    identity = torch.eye(size, dtype=step.dtype)
    m = (1 - alpha) * torch.linalg.inv(identity - alpha * step)
    return [torch.stack([m @ row for row in scores]) for scores in (p2g, g2g)]


class TorchGSRW(nn.Module):
    def __init__(self, layout, groups=4, alpha=0.95):
        super().__init__()
        self.trunk = ResNet(layout, last_stride=2)
        self.groups, self.alpha = groups, alpha
        self.pairs = Heads(groups, self.trunk.channels[-1] // groups)

    def forward(self, images, masks=None):
        """`masks`: by (group, 0 of P2G and 1 of G2G), (rows, columns, heads, features)."""
        maps = self.trunk(images)
        g = maps["t4"].mean(dim=(2, 3))
        out = {"descriptor": g, "embeddings": {"g": [g]}, "logits": {}, "maps": maps}
        if not self.training:
            return out
        size = g.shape[1] // self.groups
        pairs = []
        for j in range(self.groups):
            for i in range(self.groups):
                x = g[:, i * size : (i + 1) * size].unflatten(0, (-1, 4))
                probes, gallery = x[:, 0], x[:, 1:].flatten(0, 1)
                drop = [None if masks is None else masks[i, kind][:, :, j] for kind in (0, 1)]
                p2g = self.pairs.compare(j, probes, gallery, drop[0])
                g2g = self.pairs.compare(j, gallery, gallery, drop[1])
                pairs.append(refine(p2g, g2g, self.alpha))
        return out | {"pairs": pairs}


def total_loss(out, labels, own):
    probes, gallery = labels.view(-1, 4)[:, 0], labels.view(-1, 4)[:, 1:].flatten()
    targets = [(x[:, None] == gallery[None, :]).long().flatten() for x in (probes, gallery)]
    logits = [torch.cat([scores.flatten(0, 1) for scores in pair]) for pair in out["pairs"]]
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets).repeat(len(logits)))
    return loss, {"pairs": loss}


def make_sgd(model, own):
    """The first stage's optimizer, which follows its schedule."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    return [(sgd, True)]


def make_adam(model, own):
    """The second stage's."""
    groups = [
        {"params": list(model.trunk.parameters()), "lr": 1e-6},
        {"params": list(model.pairs.parameters()), "lr": 1e-5},
    ]
    return [(torch.optim.Adam(groups), True)]

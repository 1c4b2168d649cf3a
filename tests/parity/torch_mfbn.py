"""MFBN in PyTorch, written from what its authors' code computes; shares no code with `mros_jax`.

He et al., "MFBN: An Efficient Base Model For Person Re-Identification", 2019.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_mgn import Reduce, Rest, Start
from tests.parity.torch_mros import triplet_loss


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, ratio=8):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // ratio)
        self.excite = nn.Linear(channels // ratio, channels)

    def forward(self, x):
        means = F.adaptive_avg_pool2d(x, 1).flatten(1)
        # No normalization comes before this ReLU: `widen_gaps` has nothing to shift.
        weights = torch.sigmoid(self.excite(self.squeeze(means).clamp(min=0)))
        return x * weights[:, :, None, None]


class LeakyReduce(Reduce):
    def activate(self, x):
        return F.leaky_relu(x, 0.1)


class TorchMFBN(nn.Module):
    def __init__(self, num_classes, layout="resnet50", reduced=256):
        super().__init__()
        self.trunk = Start(layout)
        channels = self.trunk.channels
        for k in (1, 2, 3):
            self.add_module(f"attention_{k}", SqueezeExcitation(channels // 2))
            self.add_module(f"tail_{k}", Rest(layout, last_stride=1))
        self.reduction = LeakyReduce(8, channels, reduced)
        self.classifier = nn.ModuleList([nn.Linear(8 * reduced, num_classes)])

    def forward(self, images):
        maps = self.trunk(images)
        shared = maps["shared"]
        x1 = self.attention_1(shared)
        x2 = self.attention_2(shared) + x1
        x3 = self.attention_3(shared) + x2
        b1, b2, b3 = self.tail_1(x1), self.tail_2(x2), self.tail_3(x3)
        q1, q2, q3 = b1, b2 + b1, b3 + b2 + 2 * b1

        def stripes(q, count):
            return list(F.adaptive_avg_pool2d(q, (count, 1)).squeeze(3).unbind(2))

        z = [q.mean((2, 3)) for q in (q1, q2, q3)] + stripes(q2, 2) + stripes(q3, 3)
        f = self.reduction(z)
        descriptor = torch.cat(f, dim=1)
        return {
            "descriptor": descriptor,
            "embeddings": {"z": z, "f": f},
            "logits": {"global": [self.classifier[0](descriptor)]},
            "maps": maps | {"x1": x1, "x2": x2, "x3": x3, "q1": q1, "q2": q2, "q3": q3},
        }


def total_loss(out, labels, own):
    terms = {
        "triplet": triplet_loss(out["descriptor"], labels, margin=1.2),
        "cross_entropy": F.cross_entropy(out["logits"]["global"][0], labels),
    }
    return terms["cross_entropy"] + 2 * terms["triplet"], terms


def make_optimizers(model, own):
    """One optimizer, which follows the schedule."""
    adam = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=5e-4, amsgrad=True)
    return [(adam, True)]


def rate(epoch):
    """Warm-up to epoch 10, counted from 1; then cycles of 10, 20, 40, ... epochs down to 0."""
    number, start, length = epoch + 1, 10, 10
    if number < start:
        return number / 10
    while number >= start + length:
        start, length = start + length, 2 * length
    return (1 + math.cos(math.pi * (number - start) / length)) / 2

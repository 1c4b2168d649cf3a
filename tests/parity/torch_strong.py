"""Strong baseline in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPRW 2019.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_mros import center_loss, triplet_loss
from tests.parity.torch_resnet import ResNet

BETA = 0.0005  # weight of the center loss


class TorchStrong(nn.Module):
    def __init__(self, num_classes, layout, stem_relu=True):
        super().__init__()
        self.trunk = ResNet(layout, stem_relu=stem_relu)
        size = self.trunk.channels[-1]
        self.neck = nn.BatchNorm1d(size)
        self.neck.bias.requires_grad_(False)  # fixed at 0
        self.classifier = nn.ModuleList([nn.Linear(size, num_classes, bias=False)])

    def forward(self, x):
        maps = self.trunk(x)
        f_t = F.adaptive_avg_pool2d(maps["t4"], 1).flatten(1)
        f_i = self.neck(f_t)
        logits = self.classifier[0](f_i)
        return {
            "descriptor": f_i,
            "embeddings": {"f_t": [f_t], "f_i": [f_i]},
            "logits": {"f_i": [logits]},
            "maps": maps,
        }


def total_loss(out, labels, own):
    f_t = out["embeddings"]["f_t"][0]
    parts = {
        "triplet": triplet_loss(f_t, labels, margin=0.3),
        "center": center_loss(f_t, labels, own["center/f_t"]),
        "cross_entropy": F.cross_entropy(out["logits"]["f_i"][0], labels, label_smoothing=0.1),
    }
    return parts["cross_entropy"] + parts["triplet"] + BETA * parts["center"], parts


def undo_weight(own):
    """The centers see the center loss unweighted."""
    own["center/f_t"].grad /= BETA


def make_optimizers(model, own):
    """Optimizers, and whether each follows the schedule."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return [
        (torch.optim.Adam(weights, lr=3.5e-4, weight_decay=5e-4), True),
        (torch.optim.SGD(own.values(), lr=0.5), False),
    ]


def rate(epoch):
    """Share of the rate in an epoch, counted from 0, as the paper prints it for t from 1."""
    t = epoch + 1
    if t <= 10:
        return t / 10
    return 1.0 if t <= 40 else 0.1 if t <= 70 else 0.01


def rate_of_authors(epoch):
    """The authors' code, where a scheduler starts at epoch 0."""
    if epoch < 10:
        return 0.01 * (1 - epoch / 10) + epoch / 10
    return 0.1 ** sum(epoch >= milestone for milestone in (40, 70))

"""PCB with refined part pooling in PyTorch, written from the paper; shares no code with `mros_jax`.

Sun et al., "Beyond Part Models: Person Retrieval with Refined Part Pooling", ECCV 2018.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_pcb import REDUCED, STRIPES, SharedEmbedding
from tests.parity.torch_resnet import ResNet


class TorchPCBRPP(nn.Module):
    """`refined`: parts in place of stripes; `authors`: the part classifier of their code."""

    def __init__(self, num_classes, layout, *, refined=True, authors=False):
        super().__init__()
        self.refined, self.authors = refined, authors
        self.trunk = ResNet(layout)
        size = self.trunk.channels[-1]
        self.part_classifier = (
            nn.Linear(size // 8, STRIPES) if authors else nn.Linear(size, STRIPES, bias=False)
        )
        self.embedding = SharedEmbedding(size)
        self.classifier = nn.ModuleList(nn.Linear(REDUCED, num_classes) for _ in range(STRIPES))

    def assign(self, t4, dropped):
        """The shares (B, S, H, W) of each column."""
        if not self.authors:
            return F.conv2d(t4, self.part_classifier.weight[:, :, None, None]).softmax(dim=1)
        x = t4 if dropped is None else t4 * dropped
        x = F.avg_pool3d(x[:, None], (8, 1, 1))[:, 0]
        x = x - F.adaptive_avg_pool2d(x, 1)
        weight = self.part_classifier.weight[:, :, None, None]
        return F.conv2d(x, weight, self.part_classifier.bias).softmax(dim=1)

    def forward(self, x, dropped=None, dropped_map=None):
        """`dropped`: what dropout multiplies g by, (B, S, C); None: no dropout.

        `dropped_map`: the same for the input of the part classifier, (B, C, H, W).
        """
        maps = self.trunk(x)
        shares = self.assign(maps["t4"], dropped_map)
        if self.refined:
            g = [(STRIPES * p[:, None] * maps["t4"]).mean(dim=(2, 3)) for p in shares.unbind(1)]
        else:
            pooled = F.adaptive_avg_pool2d(maps["t4"], (STRIPES, 1))
            g = [pooled[:, :, i, 0] for i in range(STRIPES)]
        kept = g if dropped is None else [g[i] * dropped[:, i] for i in range(STRIPES)]
        h = self.embedding(kept)
        return {
            "descriptor": torch.cat([F.normalize(x, dim=1) for x in g], dim=1),
            "embeddings": {"g": g, "h": h},
            "logits": {"h": [fc(x) for fc, x in zip(self.classifier, h, strict=True)]},
            "maps": {**maps, "parts": shares},
        }


# Rates of trunk, part classifier and all else by stage; None: they do not move.
RATES = {
    "stage1": (0.01, None, 0.1),
    "stage2": (None, 0.01, None),
    "stage3": (0.001, 0.01, 0.01),
    "authors": (0.01, 0.01, 0.01),
}


def make_optimizers(model, stage):
    """A new optimizer of what moves; what does not is not given to it."""
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        kind = name.split(".")[0]
        groups[{"trunk": 0, "part_classifier": 1}.get(kind, 2)].append(parameter)
    moving = [
        {"params": params, "lr": rate}
        for params, rate in zip(groups, RATES[stage], strict=True)
        if rate is not None
    ]
    return [(torch.optim.SGD(moving, momentum=0.9, weight_decay=5e-4, nesterov=True), True)]

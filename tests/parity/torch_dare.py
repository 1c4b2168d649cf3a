"""DaRe in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Wang et al., "Resource Aware Person Re-identification across Multiple Resolutions", CVPR 2018.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity import torch_densenet
from tests.parity.torch_mros import triplet_loss
from tests.parity.torch_resnet import ResNet

LEVELS = ("t1", "t2", "t3", "t4")


class TorchDaRe(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.dense = layout in torch_densenet.LAYOUTS
        make = torch_densenet.DenseNet if self.dense else ResNet
        self.trunk = make(layout, last_stride=2)
        for level, channels in zip(LEVELS, self.trunk.channels, strict=True):
            if self.dense and level != "t4":
                setattr(self, f"norm_{level}", nn.BatchNorm2d(channels))
            # Linear, batch normalization, ReLU; linear.
            reduction = nn.Linear(channels, 1024)
            reduction.add_module("bn", nn.BatchNorm1d(1024))
            setattr(self, f"reduction_{level}", reduction)
            setattr(self, f"embedding_{level}", nn.Linear(1024, 128))
        self.fusion = nn.Linear(4, 1, bias=False)

    def forward(self, x):
        maps = self.trunk(x)
        stages = {}
        for i, level in enumerate(LEVELS, start=1):
            stage = maps[level]
            if self.dense and level != "t4":
                stage = F.relu(getattr(self, f"norm_{level}")(stage))
            reduction = getattr(self, f"reduction_{level}")
            h = F.relu(reduction.bn(reduction(stage.mean(dim=(2, 3)))))
            stages[f"stage{i}"] = [getattr(self, f"embedding_{level}")(h)]
        fused = sum(w * e for w, [e] in zip(self.fusion.weight[0], stages.values(), strict=True))
        return {"descriptor": fused, "embeddings": stages, "logits": {}, "maps": maps}


def total_loss(out, labels, own):
    vectors = {name: e for name, [e] in out["embeddings"].items()} | {"fused": out["descriptor"]}
    parts = {name: triplet_loss(e, labels, margin=None) for name, e in vectors.items()}
    return torch.stack(tuple(parts.values())).sum(), parts


def make_optimizers(model, own):
    """Optimizers, and whether each follows the schedule."""
    return [(torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=1e-4), True)]


def rate_at(step):
    """Share of 3e-4 at a training step."""
    return 1.0 if step <= 30_000 else 0.001 ** ((step - 30_000) / 30_000)

"""MROS in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Okay et al., "Multi-Resolution Overlapping Stripes Network for Person Re-Identification", 2019.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_resnet import ResNet


class TorchMROS(nn.Module):
    def __init__(
        self,
        num_classes: int,
        setting: str = "IV",
        layout: str = "resnet50",
        num_stripes: int = 6,
        last_stride: int = 1,
    ):
        super().__init__()
        self.num_stripes, self.overlap = num_stripes, setting != "I"
        self.levels = ("t3", "t4") if setting == "IV" else ("t4",)
        self.trunk = ResNet(layout, last_stride)
        windows = num_stripes - 1 if self.overlap else num_stripes
        dims = dict(zip(("t1", "t2", "t3", "t4"), self.trunk.channels, strict=True))
        for k in self.levels:
            norms = [nn.BatchNorm1d(dims[k]) for _ in range(windows)]
            for bn in norms:
                bn.bias.requires_grad_(False)  # BNNeck: fixed at 0
            setattr(self, f"neck_{k}", nn.ModuleList(norms))
            linear = [nn.Linear(dims[k], num_classes) for _ in range(windows)]
            setattr(self, f"classifier_{k}", nn.ModuleList(linear))

    def windows(self, feature):
        """Global average pooling over each window of the map itself, one after another."""
        step = feature.shape[2] // self.num_stripes
        assert step * self.num_stripes == feature.shape[2]
        span, count = (2 * step, self.num_stripes - 1) if self.overlap else (step, self.num_stripes)
        return [feature[:, :, i * step : i * step + span].mean(dim=(2, 3)) for i in range(count)]

    def forward(self, x):
        out = {"stages": self.trunk(x), "g": {}, "h": {}, "logits": {}}
        for k in self.levels:
            out["g"][k] = self.windows(out["stages"][k])
            necks, linear = getattr(self, f"neck_{k}"), getattr(self, f"classifier_{k}")
            out["h"][k] = [bn(g) for bn, g in zip(necks, out["g"][k], strict=True)]
            out["logits"][k] = [fc(h) for fc, h in zip(linear, out["h"][k], strict=True)]
        out["descriptor"] = torch.cat([g for k in self.levels for g in out["g"][k]], dim=1)
        return out


def triplet_loss(x, labels, margin=0.3, reduction="mean"):
    """Eq. 1, with every distance of the batch from the difference of the two descriptors."""
    losses = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        d = torch.linalg.vector_norm(x - x[i], dim=1)
        positive = d[others & (labels == labels[i])].max()
        negative = d[labels != labels[i]].min()
        gap = positive - negative
        losses.append(F.softplus(gap) if margin is None else F.relu(gap + margin))
    values = torch.stack(losses)
    return values.mean() if reduction == "mean" else values.sum()


def center_loss(x, labels, centers, reduction="mean"):
    """Eq. 2 ("sum"), or the mean without the half that public code computes."""
    squared = (x - centers[labels]).square().sum(dim=1)
    return squared.mean() if reduction == "mean" else squared.sum() / 2


def stack_centers(centers):
    """Of all vectors, (S, N, D); those of one alone are (N, D)."""
    return centers.reshape(-1, *centers.shape[-2:])


def total_loss(
    out, labels, centers, setting="IV", beta=0.0005, margin=0.3, smoothing=0.1, reduction="mean"
):
    """L = L_triplet + beta * L_centre + L'_cross; `centers`: list of (N, D), one per descriptor."""
    levels = ("t3", "t4") if setting == "IV" else ("t4",)
    metric = [out["descriptor"]] if setting in ("III", "IV") else out["g"]["t4"]
    triplet = torch.stack([triplet_loss(x, labels, margin, reduction) for x in metric]).mean()
    center = torch.stack(
        [center_loss(x, labels, c, reduction) for x, c in zip(metric, centers, strict=True)]
    ).mean()
    heads = [z for k in levels for z in out["logits"][k]]
    cross = torch.stack(
        [F.cross_entropy(z, labels, label_smoothing=smoothing) for z in heads]
    ).mean()
    parts = {"triplet": triplet, "center": center, "cross_entropy": cross}
    return triplet + beta * center + cross, parts

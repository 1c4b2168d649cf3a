"""HA-CNN in PyTorch, written from a description; shares no code with `mros_jax`.

Li, Zhu, Gong, "Harmonious Attention Network for Person Re-Identification", CVPR 2018.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# Ends of names. A batch normalization takes away again what the first shift and the second scale.
_SHIFT = ("conv.bias", "embedding_global.bias", "embedding_local.bias")
_SCALE = ("place_2.conv.weight",)


class Conv(nn.Module):
    """Convolution, normalization of each of several batches in one, ReLU."""

    def __init__(self, inputs, outputs, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x, batches=1):
        return F.relu(torch.cat([self.bn(y) for y in self.conv(x).chunk(batches)]))


class Streams(nn.Module):
    """Chains of (name, inputs, outputs, size, stride), or a pooling, side by side."""

    def __init__(self, *chains):
        super().__init__()
        self.chains = []
        for chain in chains:
            for name, *sizes in (step for step in chain if isinstance(step, tuple)):
                self.add_module(name, Conv(*sizes))
            self.chains.append([s[0] if isinstance(s, tuple) else s for s in chain])

    def forward(self, x, batches=1):
        results = []
        for chain in self.chains:
            y = x
            for step in chain:
                y = getattr(self, step)(y, batches) if isinstance(step, str) else step(y)
            results.append(y)
        return torch.cat(results, dim=1)


def make_keeping(inputs, outputs):
    m = outputs // 4
    chains = [[(f"chain{i}_1", inputs, m, 1), (f"chain{i}_2", m, m, 3)] for i in (1, 2, 3)]
    return Streams(*chains, [nn.AvgPool2d(3, 1, padding=1), ("pool", inputs, m, 1)])


def make_halving(inputs, outputs):
    m = outputs // 4
    return Streams(
        [("short_1", inputs, m, 1), ("short_2", m, m, 3, 2)],
        [("long_1", inputs, m, 1), ("long_2", m, m, 3), ("long_3", m, m, 3, 2)],
        [nn.MaxPool2d(3, 2, padding=1), ("pool", inputs, 2 * m, 1)],
    )


class Soft(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.place_1 = Conv(1, 1, 3, 2)
        self.place_2 = Conv(1, 1, 1)
        self.channel_1 = Conv(channels, channels // 16, 1)
        self.channel_2 = Conv(channels // 16, channels, 1)
        self.join = Conv(channels, channels, 1)

    def forward(self, x):
        place = self.place_1(x.mean(dim=1, keepdim=True))
        place = F.interpolate(place, x.shape[2:], mode="bilinear", align_corners=True)
        channel = self.channel_2(self.channel_1(F.adaptive_avg_pool2d(x, 1)))
        return torch.sigmoid(self.join(self.place_2(place) * channel))


class Hard(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x.mean(dim=(2, 3)))).unflatten(1, (4, 2))


def cut(x, shift, size, align_corners):
    """The window that is a quarter as high as the map, at (right, down)."""
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1, 0.25
    theta = theta + F.pad(shift[:, :, None], (2, 0))
    grid = F.affine_grid(theta, x.shape, align_corners=align_corners)
    window = F.grid_sample(x, grid, align_corners=align_corners)
    return F.interpolate(window, size, mode="bilinear", align_corners=True)


class Embedding(nn.Linear):
    def __init__(self, size, features):
        super().__init__(size, features)
        self.bn = nn.BatchNorm1d(features)

    def forward(self, x):
        return F.relu(self.bn(super().forward(x)))


class TorchHACNN(nn.Module):
    def __init__(
        self, num_classes, stem=32, widths=(128, 256, 384), embedded=512, align_corners=True
    ):
        super().__init__()
        self.align_corners = align_corners
        self.stem = Conv(3, stem, 3, 2)
        before = stem
        for i, width in enumerate(widths, start=1):
            self.add_module(f"inception{i}_a", make_keeping(before, width))
            self.add_module(f"inception{i}_b", make_halving(width, width))
            self.add_module(f"soft{i}", Soft(width))
            self.add_module(f"hard{i}", Hard(width))
            self.add_module(f"local{i}", make_halving(before, width))
            before = width
        self.embedding_global = Embedding(before, embedded)
        self.embedding_local = Embedding(4 * before, embedded)
        for kind in ("global", "local"):
            head = nn.ModuleList([nn.Linear(embedded, num_classes)])
            self.add_module(f"classifier_{kind}", head)

    def forward(self, x):
        part = self.get_submodule
        x = self.stem(x)
        maps, local = {"x0": x}, torch.zeros(())
        for i, size in enumerate([(24, 28), (12, 14), (6, 7)], start=1):
            y = part(f"inception{i}_b")(part(f"inception{i}_a")(x))
            shifts = part(f"hard{i}")(y)
            windows = [cut(x, shift, size, self.align_corners) for shift in shifts.unbind(dim=1)]
            local = part(f"local{i}")(torch.cat(windows) + local, batches=4)
            mask = part(f"soft{i}")(y)
            x = y * mask
            right, down = shifts.unbind(dim=2)
            box = [down - 0.25, right - 1, down + 0.25, right + 1]
            maps[f"regions_x{i}"] = (torch.stack(box, dim=2) + 1) / 2
            maps |= {f"x{i}": x, f"attention_x{i}": mask}
        pooled = torch.cat(local.mean(dim=(2, 3)).chunk(4), dim=1)
        e = {
            "global": self.embedding_global(x.mean(dim=(2, 3))),
            "local": self.embedding_local(pooled),
        }
        return {
            "descriptor": torch.cat([F.normalize(v) for v in e.values()], dim=1),
            "embeddings": {kind: [v] for kind, v in e.items()},
            "logits": {kind: [part(f"classifier_{kind}")[0](v)] for kind, v in e.items()},
            "maps": maps,
        }


def find_idle(names):
    """Of all tensors those that the loss does not depend on; running means follow the biases."""
    return tuple(name for name in names if name.endswith((*_SHIFT, *_SCALE, "bn.running_mean")))


def find_remainders(names):
    """Of all tensors those whose gradients are what is left of sums that cancel.

    All of it where the loss does not depend on them. Nearly all of it for the first normalization
    of the attention to places: as it has one channel, the second takes away what it scales and,
    where its ReLU lets everything through, what it shifts.
    """
    ends = (*_SHIFT, *_SCALE, "place_1.bn.weight", "place_1.bn.bias")
    return tuple(name for name in names if name.endswith(ends))


def make_loss(smoothing):
    """The mean over both classifiers."""

    def total_loss(out, labels, own):
        losses = [
            F.cross_entropy(logits[0], labels, label_smoothing=smoothing)
            for logits in out["logits"].values()
        ]
        loss = sum(losses) / 2
        return loss, {"cross_entropy": loss}

    return total_loss


def make_sgd(model, own):
    """Optimizers, and whether each follows the schedule."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    return [(sgd, True)]


def make_adam(model, own):
    # Rates are float32 in `mros_jax`: of other last digits the network makes much more.
    return [(torch.optim.Adam(model.parameters(), lr=float(np.float32(5e-4))), True)]


def rate(epoch):
    """Share of 0.03 in an epoch, counted from 0."""
    return 1.0 if epoch < 150 else 0.1 if epoch < 225 else 0.01

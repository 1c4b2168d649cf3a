"""Auto-ReID in PyTorch, from descriptions of DARTS's cells; shares no code with `mros_jax`.

Quan et al., "Auto-ReID: Searching for a Part-Aware ConvNet for Person Re-Identification", ICCV
2019; Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_mros import triplet_loss

# Pairs of (operation, input), two a node, in the order of the nodes.
FULL = {
    "normal": "sep 0 skip 1 dil 2 dil 0 dil 3 sep 2 dil 4 dil 3",
    "reduce": "max 0 part 1 sep 0 dil 2 dil 2 max 0 dil 4 dil 3",
}
REID_SPACE = {
    "normal": "dil 0 skip 1 max 2 sep 0 max 3 sep 1 sep 2 dil 3",
    "reduce": "skip 1 part 0 avg 2 part 0 sep 1 avg 2 skip 4 max 3",
}


def relu(x):
    # Not torch.nn.functional's, which `widen_gaps` shifts: most follow a sum, not a normalization.
    return x.clamp(min=0)


class ConvNorm(nn.Module):
    """ReLU, 1x1 convolution, batch normalization."""

    def __init__(self, inputs, outputs, activate=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = activate

    def forward(self, x):
        return self.bn(self.conv(relu(x) if self.activate else x))


class Halve(nn.Module):
    """Pixels of even rows and columns to one half of the channels, of odd ones to the other."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.conv2 = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = relu(x)
        odd = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv1(x), self.conv2(odd)], dim=1))


class Separable(nn.Module):
    def __init__(self, channels, stride, times, dilation):
        super().__init__()
        self.times = times
        for i in range(1, times + 1):
            depthwise = nn.Conv2d(
                channels,
                channels,
                3,
                stride if i == 1 else 1,
                dilation,
                dilation,
                groups=channels,
                bias=False,
            )
            self.add_module(f"depthwise{i}", depthwise)
            self.add_module(f"pointwise{i}", nn.Conv2d(channels, channels, 1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(channels))

    def forward(self, x):
        part = self.get_submodule
        for i in range(1, self.times + 1):
            x = part(f"norm{i}")(part(f"pointwise{i}")(part(f"depthwise{i}")(relu(x))))
        return x


class Own(nn.Module):
    """A linear layer and a normalization for each part."""

    def __init__(self, parts, channels, hidden):
        super().__init__()
        for i in range(parts):
            self.add_module(str(i), nn.Linear(channels, hidden))
        self.bn = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(parts))

    def forward(self, vectors):
        return [
            bn(self.get_submodule(str(i))(v))
            for i, (v, bn) in enumerate(zip(vectors, self.bn, strict=True))
        ]


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = channels // 3
        self.local = Own(4, channels, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.query = nn.Linear(hidden, hidden)

    def forward(self, x):
        """Rows of each part, and its new vector."""
        edges = [int(i * x.shape[2] / 4) for i in range(5)]
        pieces = [x[:, :, a:b] for a, b in itertools.pairwise(edges)]
        f = torch.stack(self.local([relu(piece.mean((2, 3))) for piece in pieces]), dim=1)
        attention = torch.softmax(self.key(f) @ self.query(f).transpose(1, 2), dim=2)
        mixed = attention @ f
        return [(piece.shape[2], mixed[:, i]) for i, piece in enumerate(pieces)]


class PartAware(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.attention = Attention(channels)
        wide = channels + channels // 3
        if stride == 2:
            self.reduce = Halve(wide, channels)
        else:
            self.conv = nn.Conv2d(wide, channels, 1, bias=False)
            self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        columns = [v[:, :, None].expand(-1, -1, rows) for rows, v in self.attention(x)]
        beside = torch.cat(columns, dim=2)[:, :, :, None].expand(-1, -1, -1, x.shape[3])
        x = torch.cat([x, beside], dim=1)
        return self.reduce(x) if hasattr(self, "reduce") else self.bn(self.conv(x))


class Skip(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce = Halve(channels, channels)

    def forward(self, x):
        return self.reduce(x)


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return 0 * x[:, :, :: self.stride, :: self.stride]


def make_operation(kind, channels, stride):
    return {
        "none": lambda: Zero(stride),
        "max": lambda: nn.MaxPool2d(3, stride, 1),
        "avg": lambda: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
        "sep": lambda: Separable(channels, stride, 2, 1),
        "dil": lambda: Separable(channels, stride, 1, 2),
        "skip": lambda: nn.Identity() if stride == 1 else Skip(channels),
        "part": lambda: PartAware(channels, stride),
    }[kind]()


class Cell(nn.Module):
    def __init__(self, genotype, before, last, channels, reduce, reduced):
        super().__init__()
        self.squeeze0 = Halve(before, channels) if reduced else ConvNorm(before, channels)
        self.squeeze1 = ConvNorm(last, channels)
        words = genotype.split()
        self.sources = [int(word) for word in words[1::2]]
        for i, (kind, source) in enumerate(zip(words[::2], self.sources, strict=True)):
            stride = 2 if reduce and source < 2 else 1
            self.add_module(f"node{2 + i // 2}_{i % 2}", make_operation(kind, channels, stride))

    def forward(self, before, last):
        maps = [self.squeeze0(before), self.squeeze1(last)]
        for node in range(2, 6):
            a, b = self.sources[2 * node - 4 : 2 * node - 2]
            first, second = (self.get_submodule(f"node{node}_{i}") for i in (0, 1))
            maps.append(first(maps[a]) + second(maps[b]))
        return torch.cat(maps[2:], dim=1)


class Trunk(nn.Module):
    def __init__(self, genotype, cells, width):
        super().__init__()
        self.stem_conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.names: dict[str, list[str]] = {}
        before, last, channels, reduced = width, width, width, False
        for stage, count in enumerate(cells, start=1):
            for i in range(count):
                reduce = stage > 1 and i == 0
                channels *= 2 if reduce else 1
                kind = "reduce" if reduce else "normal"
                cell = Cell(genotype[kind], before, last, channels, reduce, reduced)
                name = f"stage{stage}_cell{i}"
                self.add_module(name, cell)
                self.names.setdefault(f"t{stage}", []).append(name)
                before, last, reduced = last, 4 * channels, reduce
        self.channels = last

    def forward(self, x):
        x = F.max_pool2d(relu(self.stem_bn(self.stem_conv(x))), 3, 2, 1)
        before, maps = x, {}
        for level, names in self.names.items():
            for name in names:
                before, x = x, self.get_submodule(name)(before, x)
            maps[level] = x
        return maps


class TorchAutoReID(nn.Module):
    def __init__(self, num_classes, genotype=FULL, cells=(2, 2, 2, 2), width=64):
        super().__init__()
        self.trunk = Trunk(genotype, cells, width)
        size = self.trunk.channels
        self.neck = nn.BatchNorm1d(size)
        self.neck.bias.requires_grad_(False)  # fixed at 0
        self.classifier = nn.ModuleList([nn.Linear(size, num_classes, bias=False)])

    def forward(self, x):
        maps = self.trunk(x)
        g = list(maps.values())[-1].mean((2, 3))
        h = self.neck(g)
        return {
            "descriptor": h,
            "embeddings": {"g": [g], "h": [h]},
            "logits": {"global": [self.classifier[0](h)]},
            "maps": maps,
        }


def find_idle(model):
    """Tensors that the loss does not depend on, and running means that follow them.

    What a shift does to a part's vector a normalization takes away, to Q a softmax; and of the last
    cell what shifts a node that no other node sees: neither the neck nor a distance does.
    """
    *_, (last, cell) = model.trunk.named_children()
    ends = tuple(f"attention.{x}" for x in ("query.bias", *(f"local.{i}.bias" for i in range(4))))
    unseen = [2 + i for i in range(4) if 2 + i not in cell.sources]
    nodes = tuple(f"trunk.{last}.node{node}_" for node in unseen)
    names = model.state_dict()
    return tuple(
        name
        for name in names
        if name.endswith(ends)
        or (".local.bn." in name and name.endswith("running_mean"))
        or (name.startswith(nodes) and name.endswith((".norm1.bias", ".bn.bias")))
        or name == "neck.running_mean"
    )


def total_loss(out, labels, own):
    parts = {
        "triplet": triplet_loss(out["embeddings"]["g"][0], labels, margin=0.3),
        "cross_entropy": F.cross_entropy(out["logits"]["global"][0], labels, label_smoothing=0.1),
    }
    return parts["triplet"] + parts["cross_entropy"], parts


def make_optimizers(model, own):
    """One optimizer, which follows the schedule."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return [(torch.optim.Adam(weights, lr=0.001, weight_decay=5e-4), True)]


def rate(epoch):
    warm_up = 0.01 * (1 - epoch / 10) + epoch / 10 if epoch < 10 else 1.0
    return warm_up * 0.1 ** ((epoch >= 30) + (epoch >= 60) + (epoch >= 90))

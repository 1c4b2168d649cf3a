"""The reconstruction of TBN+ in PyTorch, from its description; shares no code with `mros_jax`."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_mgn import Reduce
from tests.parity.torch_resnet import LAYOUTS, BasicBlock, Bottleneck, ResNet


class Tree(nn.Module):
    def __init__(self, layout, channels, depth):
        super().__init__()
        self.depth = depth
        _, width, bottleneck = LAYOUTS[layout]
        block = Bottleneck if bottleneck else BasicBlock
        for level in range(2, depth + 1):
            for i in range(2 ** (level - 1)):
                self.add_module(f"node{level}_{i + 1}", block(channels, 8 * width, 1))

    def grow(self, x, level=1, place=0):
        """(level, place, map) of a node and of all below it."""
        yield level, place, x
        if level < self.depth:
            rows = x.shape[2] // 2
            for side, half in enumerate((x[:, :, :rows], x[:, :, rows:])):
                at = 2 * place + side
                child = getattr(self, f"node{level + 1}_{at + 1}")(half)
                yield from self.grow(child, level + 1, at)

    def forward(self, root):
        nodes = sorted(self.grow(root), key=lambda node: node[:2])
        return [
            [x for level, _, x in nodes if level == wanted] for wanted in range(1, self.depth + 1)
        ]


class TorchTBNPlus(nn.Module):
    def __init__(self, num_classes, layout="resnet50", depth=3, reduced=256):
        super().__init__()
        self.trunk = ResNet(layout)
        channels = self.trunk.channels[-1]
        self.tree = Tree(layout, channels, depth)
        count = 2**depth - 1
        self.reduction = Reduce(count, channels, reduced)
        self.classifier = nn.ModuleList(nn.Linear(reduced, num_classes) for _ in range(count))

    def forward(self, images):
        maps = self.trunk(images)
        levels = self.tree(maps.pop("t4"))
        g = [node.mean((2, 3)) for nodes in levels for node in nodes]
        f = self.reduction(g)
        logits = [head(x) for head, x in zip(self.classifier, f, strict=True)]
        pieces = {f"level{i}": torch.cat(nodes, dim=2) for i, nodes in enumerate(levels, start=1)}
        return {
            "descriptor": torch.cat(f, dim=1),
            "embeddings": {"g": g, "f": f},
            "logits": {"nodes": logits},
            "maps": maps | pieces,
        }


def total_loss(out, labels, own):
    heads = out["logits"]["nodes"]
    loss = sum(F.cross_entropy(x, labels, label_smoothing=0.1) for x in heads) / len(heads)
    return loss, {"cross_entropy": loss}


def make_optimizers(model, own):
    """One optimizer, which follows the schedule."""
    return [(torch.optim.Adam(model.parameters(), lr=0.001, weight_decay=5e-4), True)]


def rate(epoch):
    warm_up = 0.01 * (1 - epoch / 10) + epoch / 10 if epoch < 10 else 1.0
    return warm_up * 0.1 ** ((epoch >= 30) + (epoch >= 60) + (epoch >= 90))

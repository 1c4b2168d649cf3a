"""MGN in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Wang et al., "Learning Discriminative Features with Multiple Granularities for Person
Re-Identification", ACM Multimedia 2018. Names are those of the export.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.torch_mros import triplet_loss
from tests.parity.torch_resnet import ResNet


class Start(nn.Module):
    """The layers that all branches share: up to the first block of conv4."""

    def __init__(self, layout):
        super().__init__()
        whole = ResNet(layout)
        self.conv1, self.bn1 = whole.conv1, whole.bn1
        self.layer1, self.layer2, self.layer3 = whole.layer1, whole.layer2, whole.layer3[:1]
        self.channels = whole.channels[-1]  # of what the branches give

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        t1 = self.layer1(x)
        t2 = self.layer2(t1)
        return {"t1": t1, "t2": t2, "shared": self.layer3(t2)}


class Rest(nn.Module):
    """One branch's own layers; a slice of a Sequential keeps its numbers, "layer3.1" first."""

    def __init__(self, layout, last_stride):
        super().__init__()
        whole = ResNet(layout, last_stride)
        self.layer3, self.layer4 = whole.layer3[1:], whole.layer4

    def forward(self, x):
        return self.layer4(self.layer3(x))


class Reduce(nn.Module):
    """A linear layer without bias, batch normalization and ReLU for each of some vectors."""

    def __init__(self, count, channels, reduced):
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm1d(reduced) for _ in range(count))
        self.linear = [nn.Linear(channels, reduced, bias=False) for _ in range(count)]
        for i, linear in enumerate(self.linear):
            self.add_module(str(i), linear)

    def forward(self, vectors):
        # The ReLU comes right after its normalization, where `widen_gaps` looks for it.
        triples = zip(vectors, self.linear, self.bn, strict=True)
        return [self.activate(bn(linear(x))) for x, linear, bn in triples]

    def activate(self, x):
        return F.relu(x)


class TorchMGN(nn.Module):
    def __init__(self, num_classes, layout="resnet50", public=False, reduced=256):
        super().__init__()
        self.public = public
        self.trunk = Start(layout)
        self.tail_global = Rest(layout, last_stride=2)
        self.tail_part2 = Rest(layout, last_stride=1)
        self.tail_part3 = Rest(layout, last_stride=1)
        channels = self.trunk.channels
        for name, count in (("global", 3), ("part2", 2), ("part3", 3)):
            self.add_module(f"reduction_{name}", Reduce(count, channels, reduced))
            seen = channels if name == "global" and not public else reduced
            heads = [nn.Linear(seen, num_classes, bias=public) for _ in range(count)]
            self.add_module(f"classifier_{name}", nn.ModuleList(heads))

    def forward(self, images):
        maps = self.trunk(images)
        t4 = {
            "global": self.tail_global(maps["shared"]),
            "part2": self.tail_part2(maps["shared"]),
            "part3": self.tail_part3(maps["shared"]),
        }
        rows, columns = t4["part2"].shape[2:]

        def stripes(x, count):
            pooled = F.max_pool2d(x, (rows // count, columns))
            return list(pooled.squeeze(3).unbind(2))

        z = {
            "global": [F.max_pool2d(x, x.shape[2:]).flatten(1) for x in t4.values()],
            "part2": stripes(t4["part2"], 2),
            "part3": stripes(t4["part3"], 3),
        }
        f, logits = {}, {}
        for name, vectors in z.items():
            f[name] = getattr(self, f"reduction_{name}")(vectors)
            seen = vectors if name == "global" and not self.public else f[name]
            heads = getattr(self, f"classifier_{name}")
            logits[name] = [head(x) for head, x in zip(heads, seen, strict=True)]
        return {
            "descriptor": torch.cat(f["global"] + f["part2"] + f["part3"], dim=1),
            "embeddings": {f"z_{k}": v for k, v in z.items()} | {f"f_{k}": v for k, v in f.items()},
            "logits": logits,
            "maps": maps | {f"t4_{name}": x for name, x in t4.items()},
        }


def total_loss(out, labels, own, triplet_weight=1):
    """3 triplet losses and 8 cross-entropies."""
    triplets = [triplet_loss(x, labels, margin=1.2) for x in out["embeddings"]["f_global"]]
    heads = [x for logits in out["logits"].values() for x in logits]
    crosses = [F.cross_entropy(x, labels) for x in heads]
    assert (len(triplets), len(crosses)) == (3, 8)
    terms = {"triplet": sum(triplets) / 3, "cross_entropy": sum(crosses) / 8}
    return terms["cross_entropy"] + triplet_weight * terms["triplet"], terms


def make_optimizers(model, own):
    """One optimizer, which follows the schedule."""
    if model.public:
        adam = torch.optim.Adam(model.parameters(), lr=2e-4, weight_decay=5e-4, amsgrad=True)
        return [(adam, True)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    return [(sgd, True)]


def rate(epoch):
    return 0.1 ** ((epoch >= 40) + (epoch >= 60))


def rate_of_public(epoch):
    return 0.1 ** ((epoch >= 75) + (epoch >= 88))

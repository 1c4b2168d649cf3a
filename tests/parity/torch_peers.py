"""Networks of public codes in PyTorch with the names that their checkpoints have, at small sizes.

Written from what those codes compute, of which nothing is copied; shares no code with `mros_jax`.
docs/import.md has the figures of the real ones.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.parity import torch_densenet
from tests.parity.torch_hacnn import Conv, cut
from tests.parity.torch_resnet import ResNet

NUM_CLASSES = 7
TINY = "tiny"


def _mean(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _fixed(norm):
    """A normalization whose bias stays 0."""
    norm.bias.requires_grad_(False)
    return norm


class StrongBaseline(nn.Module):
    def __init__(self, neck=True):
        super().__init__()
        self.base = ResNet(TINY, stem_relu=False)
        size = self.base.channels[-1]
        self.classifier = nn.Linear(size, NUM_CLASSES, bias=not neck)
        self.bottleneck = _fixed(nn.BatchNorm1d(size)) if neck else None

    def forward(self, x):
        feature = _mean(self.base(x)["t4"])
        return self.bottleneck(feature) if self.bottleneck else feature


class NonLocal(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(channels, 1, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        theta, phi, g = (part(x).flatten(1) for part in (self.theta, self.phi, self.g))
        weights = theta[:, :, None] * phi[:, None, :] / theta.shape[1]
        return x + self.W((weights @ g[:, :, None]).view(len(x), 1, *x.shape[2:]))


class FastReID(nn.Module):
    """With `old` names and pooling as up to September 2020; with `gem`, its power is learned.

    Behind the last block of the stages in `non_local` is such a block; GeM then has power 3 if it
    has no other.
    """

    def __init__(self, gem=False, old=False, non_local=()):
        super().__init__()
        self.backbone = ResNet(TINY)
        self.non_local = non_local
        for i in non_local:
            block = NonLocal(self.backbone.channels[i - 1])
            self.backbone.add_module(f"NL_{i}", nn.ModuleList([block]))
        size = self.backbone.channels[-1]
        self.heads = nn.Module()
        norm = _fixed(nn.BatchNorm2d(size))
        if old:
            self.heads.bnneck = norm
            self.heads.classifier = nn.Linear(size, NUM_CLASSES, bias=False)
            self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 127.5))
            self.register_buffer("pixel_std", torch.full((1, 3, 1, 1), 51.0))
        else:
            self.heads.bottleneck = nn.Sequential(norm)
            self.heads.weight = nn.Parameter(torch.zeros(NUM_CLASSES, size))
        self.neck, self.gem, self.old = [norm], gem, old
        if gem:
            self.heads.pool_layer = nn.Module()
            self.heads.pool_layer.p = nn.Parameter(torch.ones(1))

    def forward(self, x):
        trunk = self.backbone
        x = F.relu(trunk.bn1(trunk.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.old else F.max_pool2d(x, 3, 2, ceil_mode=True)
        for i in (1, 2, 3, 4):
            x = getattr(trunk, f"layer{i}")(x)
            x = getattr(trunk, f"NL_{i}")[0](x) if i in self.non_local else x
        if self.gem or self.non_local:
            p = self.heads.pool_layer.p if self.gem else 3.0
            pooled = x.clamp(min=1e-6).pow(p).mean((2, 3), keepdim=True).pow(1 / p)
        else:
            pooled = x.mean((2, 3), keepdim=True)
        return self.neck[0](pooled)[:, :, 0, 0]


def _embed(size, features):
    return nn.Sequential(nn.Linear(size, features), nn.BatchNorm1d(features), nn.ReLU())


class TorchreidResNet(ResNet):
    def __init__(self, features=0):
        super().__init__(TINY, last_stride=1 if features else 2)
        size = self.channels[-1]
        if features:
            self.fc = _embed(size, features)
        self.classifier = nn.Linear(features or size, NUM_CLASSES)

    def forward(self, x):
        v = _mean(super().forward(x)["t4"])
        return self.fc(v) if hasattr(self, "fc") else v


class TorchreidDenseNet(torch_densenet.DenseNet):
    def __init__(self, features=0):
        super().__init__("tiny_densenet", last_stride=2)
        size = self.channels[-1]
        if features:
            self.fc = _embed(size, features)
        self.classifier = nn.Linear(features or size, NUM_CLASSES)

    def forward(self, x):
        v = _mean(super().forward(x)["t4"])
        return self.fc(v) if hasattr(self, "fc") else v


class TorchreidPCB(ResNet):
    def __init__(self, parts=6):
        super().__init__(TINY)
        self.parts = parts
        self.conv5 = nn.Module()
        self.conv5.layers = nn.Sequential(
            nn.Conv2d(self.channels[-1], 32, 1, bias=False), nn.BatchNorm2d(32)
        )
        self.classifier = nn.ModuleList(nn.Linear(32, NUM_CLASSES) for _ in range(parts))

    def forward(self, x):
        v = F.adaptive_avg_pool2d(super().forward(x)["t4"], (self.parts, 1))[..., 0]
        # There the parts of a channel are neighbours; here the channels of a part.
        return F.normalize(v, dim=1).transpose(1, 2).flatten(1)


class Beside(nn.Module):
    """Chains of layers, "stream1" first, side by side."""

    def __init__(self, *chains):
        super().__init__()
        for i, chain in enumerate(chains, start=1):
            self.add_module(f"stream{i}", nn.Sequential(*chain))

    def forward(self, x):
        return torch.cat([stream(x) for stream in self.children()], dim=1)


def _keep(inputs, outputs):
    m = outputs // 4
    chains = [[Conv(inputs, m, 1), Conv(m, m, 3)] for _ in range(3)]
    return Beside(*chains, [nn.AvgPool2d(3, 1, 1), Conv(inputs, m, 1)])


def _halve(inputs, outputs):
    m = outputs // 4
    return Beside(
        [Conv(inputs, m, 1), Conv(m, m, 3, 2)],
        [Conv(inputs, m, 1), Conv(m, m, 3), Conv(m, m, 3, 2)],
        [nn.MaxPool2d(3, 2, 1), Conv(inputs, 2 * m, 1)],
    )


class Attention(nn.Module):
    """Of a level of HA-CNN: weights of places and channels, and shifts of four regions."""

    def __init__(self, channels):
        super().__init__()
        soft, hard = self.soft_attn, self.hard_attn = nn.Module(), nn.Module()
        soft.spatial_attn, soft.channel_attn = nn.Module(), nn.Module()
        soft.spatial_attn.conv1, soft.spatial_attn.conv2 = Conv(1, 1, 3, 2), Conv(1, 1, 1)
        squeezed = channels // 16
        soft.channel_attn.conv1 = Conv(channels, squeezed, 1)
        soft.channel_attn.conv2 = Conv(squeezed, channels, 1)
        soft.conv = Conv(channels, channels, 1)
        hard.fc = nn.Linear(channels, 8)

    def forward(self, x):
        soft = self.soft_attn
        place = soft.spatial_attn.conv1(x.mean(1, keepdim=True))
        place = F.interpolate(place, x.shape[2:], mode="bilinear", align_corners=True)
        channel = soft.channel_attn.conv1(x.mean((2, 3), keepdim=True))
        channel = soft.channel_attn.conv2(channel)
        weights = torch.sigmoid(soft.conv(soft.spatial_attn.conv2(place) * channel))
        return weights, torch.tanh(self.hard_attn.fc(x.mean((2, 3)))).unflatten(1, (4, 2))


class TorchreidHACNN(nn.Module):
    def __init__(self, stem=16, widths=(16, 32, 48), features=32):
        super().__init__()
        self.conv = Conv(3, stem, 3, 2)
        before = stem
        for i, width in enumerate(widths, start=1):
            inception = nn.Sequential(_keep(before, width), _halve(width, width))
            self.add_module(f"inception{i}", inception)
            self.add_module(f"ha{i}", Attention(width))
            self.add_module(f"local_conv{i}", _halve(before, width))
            before = width
        for kind, size in (("global", before), ("local", 4 * before)):
            self.add_module(f"fc_{kind}", _embed(size, features))
            self.add_module(f"classifier_{kind}", nn.Linear(features, NUM_CLASSES))

    def forward(self, x):
        part = self.get_submodule
        x, local = self.conv(x), [0, 0, 0, 0]
        for i, size in enumerate([(24, 28), (12, 14), (6, 7)], start=1):
            y = part(f"inception{i}")(x)
            weights, shifts = part(f"ha{i}")(y)
            windows = [cut(x, shift, size, align_corners=True) for shift in shifts.unbind(1)]
            pairs = zip(windows, local, strict=True)
            local = [part(f"local_conv{i}")(window + map_) for window, map_ in pairs]
            x = y * weights
        described = self.fc_global(_mean(x)), self.fc_local(torch.cat([_mean(m) for m in local], 1))
        return torch.cat([F.normalize(e) for e in described], dim=1)


class PCBByAuthors(nn.Module):
    def __init__(self, refined=False):
        super().__init__()
        self.refined = refined
        self.base = ResNet(TINY)
        size = self.base.channels[-1]
        self.base.fc = nn.Linear(size, 10)  # ImageNet's, unused
        self.local_conv = nn.Conv2d(size, 32, 1, bias=False)
        self.feat_bn2d = nn.BatchNorm2d(32)
        for i in range(6):
            self.add_module(f"instance{i}", nn.Linear(32, NUM_CLASSES))
        if refined:
            self.local_mask = nn.Conv2d(size // 8, 6, 1)

    def forward(self, x):
        x = self.base(x)["t4"]
        if self.refined:
            grouped = x.unflatten(1, (-1, 8)).mean(2)
            shares = self.local_mask(grouped - grouped.mean((2, 3), keepdim=True)).softmax(1)
            parts = [6 * (share[:, None] * x).mean((2, 3)) for share in shares.unbind(1)]
        else:
            parts = [stripe.mean((2, 3)) for stripe in x.chunk(6, dim=2)]
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def _cut():
    """The layers up to layer3's first block, counted."""
    trunk = ResNet(TINY)
    start = (trunk.conv1, trunk.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*start, trunk.layer1, trunk.layer2, trunk.layer3[0])


def _tail(last_stride):
    trunk = ResNet(TINY, last_stride)
    return nn.Sequential(trunk.layer3[1:], trunk.layer4)


class _Branches(nn.Module):
    """What MGN's and MFBN's public codes share."""

    activation: type[nn.Module] = nn.ReLU

    def add_reductions(self, count=8):
        for i in range(count):
            layers = nn.Conv2d(128, 16, 1, bias=False), nn.BatchNorm2d(16), self.activation()
            self.add_module("reduction" if count == 1 else f"reduction_{i}", nn.Sequential(*layers))
        self.one = count == 1

    def reduce(self, vectors):
        return torch.cat(
            [
                getattr(self, "reduction" if self.one else f"reduction_{i}")(z).flatten(1)
                for i, z in enumerate(vectors)
            ],
            dim=1,
        )


class MGN(_Branches):
    """seathiefwang's; with `shared` GNAYUOHZ's; with `before` levyfan's, in our order of parts."""

    def __init__(self, pool="avg", shared=False, before=False):
        super().__init__()
        setattr(self, "backbone" if shared or before else "backone", _cut())
        self.p1, self.p2, self.p3 = _tail(2), _tail(1), _tail(1)
        self.pool = F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d
        self.add_reductions(1 if shared else 8)
        for i in range(3):
            self.add_module(f"fc_id_2048_{i}", nn.Linear(128 if before else 16, NUM_CLASSES))
        for name in ("1_0", "1_1", "2_0", "2_1", "2_2"):
            self.add_module(f"fc_id_256_{name}", nn.Linear(16, NUM_CLASSES))

    def forward(self, x):
        x = self.backone(x) if hasattr(self, "backone") else self.backbone(x)
        maps = [self.p1(x), self.p2(x), self.p3(x)]
        whole = [self.pool(m, 1) for m in maps]
        stripes = [
            stripe
            for m, count in zip(maps[1:], (2, 3), strict=True)
            for stripe in self.pool(m, (count, 1)).chunk(count, dim=2)
        ]
        return self.reduce(whole + stripes)


class LeakyReLU(nn.LeakyReLU):
    def __init__(self):
        super().__init__(0.1)


class MFBN(_Branches):
    activation = LeakyReLU

    def __init__(self):
        super().__init__()
        self.backone = _cut()
        for k in (1, 2, 3):
            attention = nn.Module()
            attention.fc = nn.Sequential(
                nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64), nn.Sigmoid()
            )
            self.add_module(f"att{k}", attention)
            self.add_module(f"p{k}", _tail(1))
        self.add_reductions()
        self.fc_id_2048 = nn.Linear(8 * 16, NUM_CLASSES)

    def forward(self, x):
        shared = self.backone(x)
        attended: Any = 0
        maps: list[Any] = []
        for k in (1, 2, 3):
            weights = getattr(self, f"att{k}").fc(_mean(shared))[:, :, None, None]
            attended = shared * weights + attended
            maps.append(getattr(self, f"p{k}")(attended) + sum(maps))
        whole = [F.adaptive_avg_pool2d(m, 1) for m in maps]
        halves = maps[1].chunk(2, dim=2)
        thirds = maps[2].chunk(3, dim=2)
        return self.reduce(whole + [m.mean((2, 3), keepdim=True) for m in (*halves, *thirds)])


def _head(size):
    layers = nn.Linear(size, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0), nn.Linear(32, 8)
    return nn.Sequential(*layers)


class DaRe(ResNet):
    def __init__(self):
        super().__init__(TINY, last_stride=2)
        for i, size in enumerate(self.channels, start=1):
            self.add_module(f"layer{i}_fc", _head(size))
        self.fusion_conv = nn.Conv1d(4, 1, 1, bias=False)

    def forward(self, x):
        maps = super().forward(x)
        stages = [getattr(self, f"layer{i}_fc")(_mean(maps[f"t{i}"])) for i in (1, 2, 3, 4)]
        return self.fusion_conv(torch.stack(stages, dim=1))[:, 0]


class DenseDaRe(torch_densenet.DenseNet):
    def __init__(self):
        super().__init__("tiny_densenet", last_stride=2)
        for i, size in enumerate(self.channels):
            self.add_module(f"layer_fc{i}", _head(size))
            if i < 3:
                self.add_module(f"avgpool{i}", nn.Sequential(nn.BatchNorm2d(size), nn.ReLU()))
        self.fusion_conv = nn.Conv1d(4, 1, 1, bias=False)

    def forward(self, x):
        maps = list(super().forward(x).values())
        maps = [getattr(self, f"avgpool{i}")(m) for i, m in enumerate(maps[:3])] + maps[3:]
        stages = [getattr(self, f"layer_fc{i}")(_mean(m)) for i, m in enumerate(maps)]
        return self.fusion_conv(torch.stack(stages, dim=1))[:, 0]


# TriNet has been written for Theano and for TensorFlow. `take(kind, shape)` gives the next of its
# arrays, in the layout that they have there.
WIDTH, BLOCKS = 16, (2, 1, 2, 1)


def _to_maps(kernel):
    """TensorFlow's (h, w, in, out) as PyTorch has it."""
    return kernel.permute(3, 2, 0, 1)


def lasagne_trinet(take, x):
    """Blue, green, red; strides in the first 1x1 convolution; inverse standard deviations."""

    def norm(x, size):
        bias, weight, mean, inverse = (
            take(k, (size,)) for k in ("bias", "scale", "mean", "inverse")
        )
        shape = (1, size) + (1,) * (x.ndim - 2)
        return (x - mean.view(shape)) * (weight * inverse).view(shape) + bias.view(shape)

    def conv(x, size, kernel, stride, relu=True):
        weight = take("weight", (size, x.shape[1], kernel, kernel))
        y = norm(F.conv2d(x, weight, None, stride, kernel // 2), size)
        return F.relu(y) if relu else y

    weight, bias = take("weight", (WIDTH, 3, 7, 7)), take("bias", (WIDTH,))
    x = F.relu(norm(F.conv2d(x, weight, bias, 2, 3), WIDTH))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    for stage, blocks in enumerate(BLOCKS):
        width = WIDTH * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shortcut = x if block else conv(x, 4 * width, 1, stride, relu=False)
            y = conv(x, width, 1, stride)
            y = conv(y, width, 3, 1)
            x = F.relu(shortcut + conv(y, 4 * width, 1, 1, relu=False))
    x = x.mean((2, 3))
    x = F.relu(norm(x @ take("weight_in_out", (x.shape[1], 32)), 32))
    return x @ take("weight_in_out", (32, 8)) + take("bias", (8,))


def slim_trinet(take, x):
    """Variables by name; strides in the last block of each stage but the last."""

    def norm(scope, x, size):
        leaves = {"beta": "bias", "gamma": "scale", "moving_mean": "mean", "moving_variance": "var"}
        v = {k: take(kind, (size,), f"{scope}/BatchNorm/{k}") for k, kind in leaves.items()}
        shape = (1, size) + (1,) * (x.ndim - 2)
        v = {k: value.view(shape) for k, value in v.items()}
        scale = v["gamma"] / (v["moving_variance"] + 1e-5).sqrt()
        return (x - v["moving_mean"]) * scale + v["beta"]

    def conv(scope, x, size, kernel, stride, relu=True):
        weight = take("weight_in_out", (kernel, kernel, x.shape[1], size), f"{scope}/weights")
        y = norm(scope, F.conv2d(x, _to_maps(weight), None, stride, kernel // 2), size)
        return F.relu(y) if relu else y

    x = conv("resnet_v1_50/conv1", x, WIDTH, 7, 2)
    x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)
    for stage, blocks in enumerate(BLOCKS, start=1):
        width = WIDTH * 2 ** (stage - 1)
        for block in range(1, blocks + 1):
            scope = f"resnet_v1_50/block{stage}/unit_{block}/bottleneck_v1"
            stride = 2 if block == blocks and stage < 4 else 1
            if x.shape[1] == 4 * width:
                shortcut = F.max_pool2d(x, 1, stride)
            else:
                shortcut = conv(f"{scope}/shortcut", x, 4 * width, 1, stride, relu=False)
            y = conv(f"{scope}/conv1", x, width, 1, 1)
            y = conv(f"{scope}/conv2", y, width, 3, stride)
            x = F.relu(shortcut + conv(f"{scope}/conv3", y, 4 * width, 1, 1, relu=False))
    x = x.mean((2, 3))
    weight = take("weight_in_out", (x.shape[1], 32), "fully_connected/weights")
    x = F.relu(norm("fully_connected", x @ weight, 32))
    weight = take("weight_in_out", (32, 8), "emb/weights")
    return x @ weight + take("bias", (8,), "emb/biases")

"""DenseNet in PyTorch, written from the paper alone; shares no code with `mros_jax`.

Huang et al., "Densely connected convolutional networks", CVPR 2017: DenseNet-BC, with torchvision's
module names, so that its published weights load into it.
"""

import torch
from torch import nn
from torch.nn import functional as F

LAYOUTS = {
    # layers of each block, channels that each adds, channels of the first convolution
    "tiny_densenet": ((1, 2, 2, 1), 8, 16),
    "densenet121": ((6, 12, 24, 16), 32, 64),
    "densenet201": ((6, 12, 48, 32), 32, 64),
}


class Layer(nn.Module):
    def __init__(self, cin, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(y)))


class Features(nn.Module):
    def __init__(self, sizes, growth, stem, last_stride):
        super().__init__()
        self.last_stride = last_stride
        self.conv0 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.norm0 = nn.BatchNorm2d(stem)
        channels, self.channels = stem, []
        for i, size in enumerate(sizes, start=1):
            block = nn.Module()
            for j in range(1, size + 1):
                block.add_module(f"denselayer{j}", Layer(channels, growth))
                channels += growth
            self.add_module(f"denseblock{i}", block)
            self.channels.append(channels)
            if i < 4:
                transition = nn.Module()
                transition.norm = nn.BatchNorm2d(channels)
                transition.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
                self.add_module(f"transition{i}", transition)
                channels //= 2
        self.norm5 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm0(self.conv0(x))), 3, 2, 1)
        stages = {}
        for i in range(1, 5):
            seen = [x]
            for layer in getattr(self, f"denseblock{i}").children():
                seen.append(layer(torch.cat(seen, dim=1)))
            stages[f"t{i}"] = x = torch.cat(seen, dim=1)
            if i < 4:
                transition = getattr(self, f"transition{i}")
                x = transition.conv(F.relu(transition.norm(x)))
                if i < 3 or self.last_stride == 2:
                    x = F.avg_pool2d(x, 2)
        stages["t4"] = F.relu(self.norm5(x))
        return stages


class DenseNet(nn.Module):
    def __init__(self, layout, last_stride=1):
        super().__init__()
        self.features = Features(*LAYOUTS[layout], last_stride)
        self.channels = self.features.channels

    def forward(self, x):
        return self.features(x)

"""ResNet in PyTorch, written from the paper alone; shares no code with `mros_jax`.

He et al., "Deep residual learning for image recognition", CVPR 2016, with torchvision's module
names, so that its published weights load into it.
"""

from torch import nn
from torch.nn import functional as F

LAYOUTS = {
    # blocks per stage, width, bottleneck?
    "tiny": ((1, 1, 1, 1), 16, False),
    "resnet18": ((2, 2, 2, 2), 64, False),
    "resnet50": ((3, 4, 6, 3), 64, True),
}


class BasicBlock(nn.Module):
    def __init__(self, cin, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(cin, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    def __init__(self, cin, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(cin, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(cin, cout, stride):
    if cin == cout and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    def __init__(self, layout, last_stride=1, stem_relu=True):
        super().__init__()
        self.stem_relu = stem_relu
        sizes, width, bottleneck = LAYOUTS[layout]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        cin, self.channels = width, []
        for i, size in enumerate(sizes):
            planes, stride, blocks = width * 2**i, (1, 2, 2, last_stride)[i], []
            for j in range(size):
                block = Bottleneck if bottleneck else BasicBlock
                blocks.append(block(cin, planes, stride if j == 0 else 1))
                cin = planes * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.channels.append(cin)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = F.max_pool2d(F.relu(x) if self.stem_relu else x, 3, 2, 1)
        stages = {}
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            stages[f"t{i}"] = x
        return stages

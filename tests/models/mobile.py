"""Networks for mobile devices: depthwise convolutions, squeeze-and-excitation, shuffled channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


class InvertedResidual(nn.Module):
    """kuangliu's MobileNetV2 block: expanded, depthwise, projected; added to its input where the stride is 1."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = expansion * channels
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, width, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride == 1 and channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    def __init__(self, width: int, blocks: list[tuple[int, int, int]], last: int, classes: int) -> None:
        """blocks: (expansion, width, stride)."""
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        widths = [width, *(b for _, b, _ in blocks)]
        steps = zip(widths, blocks, strict=False)
        self.layers = nn.Sequential(*[InvertedResidual(a, b, e, s) for a, (e, b, s) in steps])
        self.conv2, self.bn2 = nn.Conv2d(widths[-1], last, 1, bias=False), nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.relu(self.bn2(self.conv2(out)))
        out = F.avg_pool2d(out, out.size(2))
        return self.linear(out.view(out.size(0), -1))


class SwishSqueeze(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.se1, self.se2 = nn.Conv2d(channels, squeezed, 1, bias=True), nn.Conv2d(squeezed, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out = F.adaptive_avg_pool2d(x, (1, 1))
        out = self.se2(swish(self.se1(out))).sigmoid()
        return x * out


class MBConv(nn.Module):
    """kuangliu's EfficientNet block: expanded, depthwise, squeezed and excited, projected; drop_connect is off."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int, drop: float = 0.0) -> None:
        super().__init__()
        middle = expansion * channels
        self.drop_rate = drop
        self.conv1, self.bn1 = nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, kernel, stride, padding=kernel // 2, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.se = SwishSqueeze(middle, max(1, int(channels * 0.25)))
        self.conv3, self.bn3 = nn.Conv2d(middle, width, 1, bias=False), nn.BatchNorm2d(width)
        self.has_skip = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        out = swish(self.bn1(self.conv1(x)))
        out = swish(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.se(out)))
        if self.has_skip:
            if self.training and self.drop_rate > 0:
                keep = 1.0 - self.drop_rate
                out = out / keep * torch.empty([x.shape[0], 1, 1, 1], dtype=x.dtype).bernoulli_(keep)
            out = out + x
        return out


class EfficientNet(nn.Module):
    def __init__(self, width: int, blocks: list[MBConv], features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout_rate = dropout
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(swish(self.bn1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(out, 1)
        out = out.view(out.size(0), -1)
        if self.training and self.dropout_rate > 0:
            out = F.dropout(out, p=self.dropout_rate)
        return self.linear(out)


class Shuffle(nn.Module):
    """The channels of the groups, interleaved."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        return x.view(n, self.groups, c // self.groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """kuangliu's ShuffleNetV2 block: half of the channels pass, the other half is transformed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.shuffle = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        half = int(x.size(1) * 0.5)
        x1, x2 = x[:, :half, :, :], x[:, half:, :, :]
        out = F.relu(self.bn1(self.conv1(x2)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat([x1, out], 1))


class ShuffleDown(nn.Module):
    """kuangliu's ShuffleNetV2 block of stride 2: two branches, concatenated."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.left = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 2, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.right = nn.Sequential(
            nn.Conv2d(channels, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.shuffle = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(torch.cat([self.left(x), self.right(x)], 1))


class ShuffleNetV2(nn.Module):
    def __init__(self, width: int, widths: list[int], last: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width)
        sizes = zip([width, *widths], widths, strict=False)
        self.layers = nn.Sequential(*[nn.Sequential(ShuffleDown(a, b), ShuffleUnit(b)) for a, b in sizes])
        self.conv2, self.bn2 = nn.Conv2d(widths[-1], last, 1, bias=False), nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.relu(self.bn2(self.conv2(out)))
        out = F.avg_pool2d(out, out.size(2))
        return self.linear(out.view(out.size(0), -1))

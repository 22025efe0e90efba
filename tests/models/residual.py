"""Residual and densely connected networks."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(channels: int, width: int, stride: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False, **options)


class DropBlock(nn.Module):
    """Drops squares of an image in train mode, and returns its input in eval mode."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        if not self.training:
            return x
        seeds = torch.bernoulli(torch.full_like(x, gamma))
        dropped = F.max_pool2d(seeds, self.block_size, 1, self.block_size // 2)[..., : x.shape[2], : x.shape[3]]
        kept = 1 - dropped
        return kept * x * (kept.numel() / kept.sum())


class SqueezeExcite(nn.Module):
    """RFS's SELayer: a scale for each channel, computed from the means over the image."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        scale = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * scale


class ResNet12Block(nn.Module):
    """Three convolutions around a shortcut, a max-pool and DropBlock, whose rate depends on a counter of batches."""

    def __init__(self, channels: int, width: int, block_size: int, drop_rate: float, squeeze: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.relu = nn.LeakyReLU(0.1)
        self.maxpool = nn.MaxPool2d(2)
        self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.se = SqueezeExcite(width, 4) if squeeze else None
        self.drop_rate, self.block_size = drop_rate, block_size
        self.num_batches_tracked = 0
        self.DropBlock = DropBlock(block_size).eval()

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.se is not None:
            out = self.se(out)
        out += self.downsample(x)
        out = self.maxpool(self.relu(out))
        if self.drop_rate > 0:
            size = out.size()[2]
            keep = max(1.0 - self.drop_rate / (20 * 2000) * self.num_batches_tracked, 1.0 - self.drop_rate)
            gamma = (1 - keep) / self.block_size**2 * size**2 / (size - self.block_size + 1) ** 2
            out = self.DropBlock(out, gamma=gamma)
        return out


class ResNet12(nn.Module):
    """Four blocks, the mean over the image and a linear layer: learn2learn, MetaOptNet, RFS (with `squeeze`), FEAT."""

    def __init__(self, widths: list[int], classes: int, drop_rate: float = 0.0, squeeze: bool = False) -> None:
        super().__init__()
        sizes = zip([3, *widths], widths, strict=False)
        self.layers = nn.Sequential(*[ResNet12Block(a, b, 1, drop_rate, squeeze) for a, b in sizes])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor, is_feat: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return (features, self.classifier(x)) if is_feat else self.classifier(x)


class BasicBlock(nn.Module):
    """kuangliu's ResNet block: its shortcut is an empty Sequential where the shapes agree."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """CloserLookFewShot's bottleneck block: 1 x 1, 3 x 3 and 1 x 1."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        middle = width // 4
        self.C1, self.BN1 = nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.C2, self.BN2 = conv3x3(middle, middle, stride), nn.BatchNorm2d(middle)
        self.C3, self.BN3 = nn.Conv2d(middle, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        if channels != width:
            self.shortcut, self.shortcut_type = nn.Conv2d(channels, width, 1, stride, bias=False), "1x1"
        else:
            self.shortcut_type = "identity"

    def forward(self, x: Tensor) -> Tensor:
        short_out = x if self.shortcut_type == "identity" else self.shortcut(x)
        out = self.relu(self.BN1(self.C1(x)))
        out = self.relu(self.BN2(self.C2(out)))
        out = self.BN3(self.C3(out))
        return self.relu(out + short_out)


class PreActSqueezeBlock(nn.Module):
    """kuangliu's SENet block: normalised before the convolutions, squeezed by average pool and 1 x 1 convolutions."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3x3(channels, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False))
        self.fc1 = nn.Conv2d(width, width // 2, kernel_size=1)
        self.fc2 = nn.Conv2d(width // 2, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        w = F.avg_pool2d(out, out.size(2))
        w = torch.sigmoid(self.fc2(F.relu(self.fc1(w))))
        out = out * w
        out += shortcut
        return out


class GroupedBottleneck(nn.Module):
    """kuangliu's ResNeXt block: the 3 x 3 convolution has groups."""

    def __init__(self, channels: int, groups: int, width: int, stride: int = 1) -> None:
        super().__init__()
        middle = groups * width
        self.conv1, self.bn1 = nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv3x3(middle, middle, stride, groups=groups), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, 2 * middle, 1, bias=False), nn.BatchNorm2d(2 * middle)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != 2 * middle:
            conv = nn.Conv2d(channels, 2 * middle, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(2 * middle))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out)


def staged(stem: nn.Module, blocks: list[nn.Module], features: int, classes: int, pool: int) -> nn.Sequential:
    """kuangliu's frame: a stem of convolution, BatchNorm and ReLU, blocks, an average pool and a linear layer."""
    return nn.Sequential(stem, *blocks, nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(features, classes))


def stem(width: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU())


class WideBlock(nn.Module):
    """FEAT's wide block: normalised before the convolutions, with dropout between them."""

    def __init__(self, channels: int, width: int, dropout: float, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 3, padding=1, bias=True)
        self.dropout = nn.Dropout(p=dropout)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, padding=1, bias=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


class WideResNet(nn.Module):
    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=True)
        sizes = list(pairwise(widths))
        self.layers = nn.Sequential(*[WideBlock(a, b, 0.0, 1 if i == 0 else 2) for i, (a, b) in enumerate(sizes)])
        self.bn1 = nn.BatchNorm2d(widths[-1], momentum=0.9)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.layers(self.conv1(x))))
        out = F.avg_pool2d(out, out.size(2))
        return self.linear(out.view(out.size(0), -1))


class DenseBlock(nn.Module):
    """kuangliu's DenseNet bottleneck: its output and its input, concatenated."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class Transition(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, growth: int, stages: int, classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [conv3x3(3, channels)]
        for i in range(stages):
            layers.append(DenseBlock(channels, growth))
            channels += growth
            if i < stages - 1:
                layers.append(Transition(channels, channels // 2))
                channels //= 2
        self.features = nn.Sequential(*layers)
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = F.relu(self.bn(out))
        out = F.avg_pool2d(out, out.size(2))
        return self.linear(out.view(out.size(0), -1))


class ChannelsFirstNorm(nn.Module):
    """ConvNeXt's LayerNorm over the channels of [n, channels, height, width], written out."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """A depthwise 7 x 7 convolution, then LayerNorm and two linear layers on the last axis, scaled for each channel."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(scale * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        return residual + x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 2, 2), ChannelsFirstNorm(widths[0])]
        for i, width in enumerate(widths):
            if i:
                layers += [ChannelsFirstNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, 2)]
            layers.append(ConvNeXtBlock(width, 0.5))
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x).mean([-2, -1])))

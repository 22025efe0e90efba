"""The models of the workloads from 2017 on: attention, fields of coordinates, mobile blocks, U-Net, physics."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Attention with one product for queries, keys and values. x is `[N, tokens, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = (part.view(n, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward net with GELU, each with LayerNorm before it and a residual sum after it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, hidden)
        self.feed_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))


def transformer_blocks(count: int, width: int, heads: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(count)))


class Transformer(nn.Module):
    """Linear, learned positions, two blocks, mean over the tokens, Linear. x is `[N, tokens, inputs]`."""

    def __init__(self, ways: int, inputs: int = 16, tokens: int = 32, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = transformer_blocks(2, width, 4, hidden)
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.positions).mean(1))


class ViT(nn.Module):
    """The vision transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929), small. x is `[N, 3, side, side]`."""

    def __init__(self, ways: int, side: int = 32, patch: int = 4, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + (side // patch) ** 2, width))
        self.blocks = transformer_blocks(2, width, 4, hidden)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), patches), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Siren(nn.Module):
    """Linear layers with `sin(30 x)` between them, initialised as in Sitzmann et al. 2020 (arXiv 2006.09661, 3.2)."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for i, layer in enumerate(self.layers):
            bound = 1 / sizes[i] if i == 0 else math.sqrt(6 / sizes[i]) / 30
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.sin(30 * layer(x))
        return last(x)


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018 (arXiv 1709.01507): each channel times a number that depends on the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """Expansion, depthwise 3x3, squeeze-and-excitation, projection; a residual sum where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        middle = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.expand = nn.Conv2d(inputs, middle, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(middle, track_running_stats=False)
        self.depthwise = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(middle, track_running_stats=False)
        self.excitation = SqueezeExcitation(middle, inputs // 4)
        self.project = nn.Conv2d(middle, outputs, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(outputs, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.expand_norm(self.expand(x)))
        y = F.silu(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(self.excitation(y)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A small EfficientNet (Tan and Le 2019, arXiv 1905.11946): a stem and four MBConv. x is `[N, 3, 32, 32]`."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16, track_running_stats=False)
        self.blocks = nn.Sequential(MBConv(16, 16, 1), MBConv(16, 24, 2), MBConv(24, 24, 1), MBConv(24, 40, 2))
        self.head = nn.Linear(40, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.silu(self.stem_norm(self.stem(x)))).mean((2, 3)))


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, outputs, 3, padding=1, bias=False) for c in (inputs, outputs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, track_running_stats=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class UNet(nn.Module):
    """A U-Net of two levels (Ronneberger et al. 2015, arXiv 1505.04597). x is `[N, 3, side, side]`, y one channel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([DoubleConv(3, width), DoubleConv(width, 2 * width)])
        self.bottom = DoubleConv(2 * width, 4 * width)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in (2 * width, width))
        self.up = nn.ModuleList(DoubleConv(2 * c, c) for c in (2 * width, width))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat((skips.pop(), grow(x)), 1))
        return self.head(x)


class Burgers(nn.Module):
    """A physics-informed net (Raissi et al. 2019): `u` and the residual `u_t + u u_x - nu u_xx`, both of `[N, 2]`.

    A sample is a point `(x, t)`; the derivatives by it are autograd's.
    """

    VISCOSITY = 0.1

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, points: Tensor) -> Tensor:
        x, t = (points[:, i : i + 1].detach().requires_grad_() for i in (0, 1))
        *hidden, last = self.layers
        u = torch.cat((x, t), 1)
        for layer in hidden:
            u = torch.tanh(layer(u))
        u = last(u)
        u_x, u_t = torch.autograd.grad(u, (x, t), torch.ones_like(u), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x, x, torch.ones_like(u_x), create_graph=True)
        return torch.cat((u, u_t + u * u_x - self.VISCOSITY * u_xx), 1)

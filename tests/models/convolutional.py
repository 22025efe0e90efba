"""Convolutional networks: few-shot backbones, and the U-Net."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBase(nn.Module):
    """Blocks of convolution, BatchNorm, ReLU and max-pool, then a linear layer: learn2learn's CNN4 and OmniglotCNN.

    OmniglotCNN has no pool: its convolutions have stride 2, and the head sees the mean over the image.
    """

    def __init__(self, channels: int, hidden: int, blocks: int, features: int, classes: int, pool: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(blocks):
            stride = 1 if pool else 2
            conv = nn.Conv2d(channels if i == 0 else hidden, hidden, 3, stride, padding=1, bias=True)
            norm = nn.BatchNorm2d(hidden, affine=True)
            nn.init.uniform_(norm.weight)
            nn.init.xavier_uniform_(conv.weight)
            layers.append(nn.Sequential(*([conv, norm, nn.ReLU()] + ([nn.MaxPool2d(2)] if pool else []))))
        self.base = nn.Sequential(*layers)
        self.pool = pool
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        x = x.view(x.size(0), -1) if self.pool else x.mean(dim=[2, 3])
        return self.head(x)


def omniglot_in_place(classes: int, hidden: int) -> nn.Sequential:
    """The network of the Omniglot examples of higher and functorch: no padding, ReLU in place, untracked BatchNorm."""
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [
            nn.Conv2d(1 if i == 0 else hidden, hidden, 3),
            nn.BatchNorm2d(hidden, momentum=1, affine=True, track_running_stats=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, 2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden, classes))


class OfDictionary(nn.Module):
    """A network called with its parameters in a dictionary, or None for its own: torchmeta's MetaModule.

    The features are a Sequential of named blocks; `forward(inputs, params=None)`.
    """

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        blocks = [(f"layer{i + 1}", self.block(channels if i == 0 else hidden, hidden)) for i in range(4)]
        self.features = nn.Sequential(OrderedDict(blocks))
        self.classifier = nn.Linear(hidden, classes)

    @staticmethod
    def block(channels: int, hidden: int) -> nn.Sequential:
        layers = OrderedDict(
            conv=nn.Conv2d(channels, hidden, 3, padding=1, bias=True),
            norm=nn.BatchNorm2d(hidden, momentum=1.0, track_running_stats=False),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
        )
        return nn.Sequential(layers)

    def subset(self, params: dict[str, Tensor] | None, key: str) -> dict[str, Tensor] | None:
        if params is None:
            return None
        return {name[len(key) + 1 :]: p for name, p in params.items() if name.startswith(f"{key}.")}

    def forward(self, inputs: Tensor, params: dict[str, Tensor] | None = None) -> Tensor:
        given = self.subset(params, "features")
        features = self.features(inputs) if given is None else torch.func.functional_call(self.features, given, inputs)
        features = features.view((features.size(0), -1))
        given = self.subset(params, "classifier")
        return self.classifier(features) if given is None else F.linear(features, given["weight"], given["bias"])


class VggReluNorm(nn.Module):
    """MAML++'s network: `forward(x, num_step, params=None, training=True)` over a dictionary of stages.

    Each stage draws its parameters from a dictionary if there is one, otherwise from itself.
    """

    def __init__(self, channels: int, hidden: int, classes: int, stages: int) -> None:
        super().__init__()
        self.layer_dict = nn.ModuleDict()
        self.stages = stages
        for i in range(stages):
            self.layer_dict[f"conv{i}"] = nn.Conv2d(channels if i == 0 else hidden, hidden, 3, padding=1)
            self.layer_dict[f"norm{i}"] = nn.BatchNorm2d(hidden)
        self.layer_dict["linear"] = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, num_step: int = 0, params: dict | None = None, training: bool = True) -> Tensor:
        def of(name: str) -> dict[str, Tensor]:
            own = dict(self.layer_dict[name].named_parameters())
            return own if params is None else {key: params[f"layer_dict.{name}.{key}"] for key in own}

        out = x
        for i in range(self.stages):
            conv, norm = of(f"conv{i}"), of(f"norm{i}")
            out = F.conv2d(out, conv["weight"], conv["bias"], stride=1, padding=1, dilation=1, groups=1)
            out = F.batch_norm(out, None, None, norm["weight"], norm["bias"], training=training, momentum=0.1, eps=1e-5)
            out = F.leaky_relu(out)
            out = F.max_pool2d(input=out, kernel_size=(2, 2), stride=2, padding=0)
        out = out.view(out.size(0), -1)
        linear = of("linear")
        return F.linear(out, linear["weight"], linear["bias"])


class Learner(nn.Module):
    """dragen1860's Learner: a list of (name, sizes) is run by a loop over a ParameterList that is indexed by a counter.

    The statistics of BatchNorm are frozen parameters of a second list.
    """

    def __init__(self, config: list[tuple[str, list[int]]]) -> None:
        super().__init__()
        self.config = config
        self.vars = nn.ParameterList()
        self.vars_bn = nn.ParameterList()
        for name, sizes in config:
            if name in ("conv2d", "linear"):
                shape = sizes[:4] if name == "conv2d" else sizes
                weight = nn.Parameter(torch.ones(*shape))
                nn.init.kaiming_normal_(weight)
                self.vars.append(weight)
                self.vars.append(nn.Parameter(torch.zeros(shape[0])))
            elif name == "bn":
                self.vars.extend([nn.Parameter(torch.ones(sizes[0])), nn.Parameter(torch.zeros(sizes[0]))])
                statistics = torch.zeros(sizes[0]), torch.ones(sizes[0])
                self.vars_bn.extend([nn.Parameter(s, requires_grad=False) for s in statistics])

    def forward(self, x: Tensor, vars: nn.ParameterList | None = None, bn_training: bool = True) -> Tensor:
        if vars is None:
            vars = self.vars
        at = statistics = 0
        for name, sizes in self.config:
            if name == "conv2d":
                x = F.conv2d(x, vars[at], vars[at + 1], stride=sizes[4], padding=sizes[5])
                at += 2
            elif name == "linear":
                x = F.linear(x, vars[at], vars[at + 1])
                at += 2
            elif name == "bn":
                mean, var = self.vars_bn[statistics], self.vars_bn[statistics + 1]
                x = F.batch_norm(x, mean, var, weight=vars[at], bias=vars[at + 1], training=bn_training)
                at += 2
                statistics += 2
            elif name == "relu":
                x = F.relu(x, inplace=bool(sizes[0]))
            elif name == "max_pool2d":
                x = F.max_pool2d(x, *sizes)
            elif name == "flatten":
                x = x.view(x.size(0), -1)
        assert at == len(vars)
        return x


class R2D2(nn.Module):
    """The embedding of R2D2, in MetaOptNet: BatchNorm, pool, then leaky ReLU; the last two blocks' outputs together."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        sizes = [channels, *widths]
        keep = [1.0, 1.0, 0.9, 0.7]
        blocks = [self.block(a, b, i < 3, keep[i]) for i, (a, b) in enumerate(zip(sizes, widths, strict=False))]
        self.block1, self.block2, self.block3, self.block4 = blocks

    @staticmethod
    def block(channels: int, width: int, activation: bool, keep: float) -> nn.Sequential:
        block = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.MaxPool2d(2))
        if activation:
            block.add_module("LeakyReLU", nn.LeakyReLU(0.1))
        if keep < 1.0:
            block.add_module("Dropout", nn.Dropout(p=1 - keep, inplace=False).eval())
        return block

    def forward(self, x: Tensor) -> Tensor:
        third = self.block3(self.block2(self.block1(x)))
        fourth = self.block4(third)
        return torch.cat((third.view(third.size(0), -1), fourth.view(fourth.size(0), -1)), 1)


class ConvBlock(nn.Module):
    """CloserLookFewShot's block: its layers are also in a list, and in a Sequential under a second name."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.C = nn.Conv2d(channels, width, 3, padding=1)
        self.BN = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.parametrized_layers = [self.C, self.BN, self.relu, self.pool]
        self.trunk = nn.Sequential(*self.parametrized_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


class OneChannel(nn.Module):
    """CloserLookFewShot's Conv4S, for characters: the first of three equal channels, and one more flattening."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*[ConvBlock(1 if i == 0 else width, width) for i in range(4)], nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x[:, 0:1, :, :])


class CosineClassifier(nn.Module):
    """Baseline++'s distLinear: the cosines of a feature vector and the rows of a weight, whose norms are learned."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.L = nn.utils.parametrizations.weight_norm(nn.Linear(features, classes, bias=False), "weight", dim=0)
        self.scale_factor = 2

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.norm(x, p=2, dim=1).unsqueeze(1).expand_as(x)
        return self.scale_factor * self.L(x.div(norm + 0.00001))


class DoubleConv(nn.Sequential):
    """Twice a convolution, BatchNorm and ReLU."""

    def __init__(self, channels: int, width: int, middle: int | None = None) -> None:
        middle = middle or width
        layers: list[nn.Module] = []
        for a, b in ((channels, middle), (middle, width)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Up(nn.Module):
    """Doubles the size, pads to the size of the skip connection, and concatenates it."""

    def __init__(self, channels: int, width: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(channels, width, channels // 2)
        else:
            self.up = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(channels, width)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        below = self.up(below)
        height, width = (skip.size(i) - below.size(i) for i in (2, 3))
        below = F.pad(below, [width // 2, width - width // 2, height // 2, height - height // 2])
        return self.conv(torch.cat([skip, below], dim=1))


class UNet(nn.Module):
    """milesial's U-Net: contracting by max-pools, expanding by transposed convolutions or bilinear upsampling."""

    def __init__(self, channels: int, classes: int, width: int, levels: int, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(channels, width)
        widths = [width * 2**i for i in range(levels + 1)]
        if bilinear:
            widths[-1] //= 2
        steps = zip([width * 2**i for i in range(levels)], widths[1:], strict=True)
        self.downs = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), DoubleConv(a, b)) for a, b in steps)
        ups = []
        for i in reversed(range(levels)):
            ups.append(Up(width * 2 ** (i + 1), width * 2**i // (2 if bilinear and i else 1), bilinear))
        self.ups = nn.ModuleList(ups)
        self.outc = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.outc(x)

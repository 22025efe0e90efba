"""The workloads: a model, the shapes of its meta-batch, and synthetic tasks.

Sinusoid, policy, Omniglot and mini-ImageNet follow Finn et al. 2017 (arXiv 1703.03400, section 5).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modern_nets import Burgers, MobileNet, Siren, Transformer, UNet, ViT

if TYPE_CHECKING:  # benchmarks.same_bits chooses which maml_cuda its processes import
    from maml_cuda import optim


class Tasks(NamedTuple):
    """A meta-batch: inputs `[tasks, n, ...]`, targets `[tasks, n]` (labels) or `[tasks, n, outputs]`."""

    x_spt: Tensor
    y_spt: Tensor
    x_qry: Tensor
    y_qry: Tensor

    def double(self) -> Tasks:
        return Tasks(*(x.double() if x.is_floating_point() else x for x in self))


DrawSet = Callable[[int], tuple[Tensor, Tensor]]
Draw = Callable[[int, int], DrawSet]

# Two correct float32 computations may decide a ReLU or a maximum differently, which changes the meta-gradient of a deep
# network: that of autograd differs from float64 by 1e-4 (Omniglot), 2e-2 (mini-ImageNet), 0.15 (ResNet-12).
DEEP_TOLERANCE = 0.5
SMOOTH_TOLERANCE = 1e-3  # of a deep network without such decisions, whose error is up to 1e-4


@dataclass(frozen=True)
class Workload:
    """A model with loss and shapes. It can be pickled, because `model` and `draw` are functions of a module.

    Attributes:
        draw: `draw(tasks, seed)(n)` returns x and y of a support or query set with n samples per task.
        support, query: samples per task.
        inner_optimizer, inner_clip_norm: as of FusedMAML. The baselines of inner_optimizer_steps.py know them.
        float32_tolerance: the relative error of a float32 meta-gradient that only a wrong computation exceeds.
    """

    name: str
    model: Callable[[], nn.Module]
    draw: Draw
    loss: str
    tasks: int
    support: int
    query: int
    inner_steps: int
    inner_lr: float
    float32_tolerance: float = 1e-4
    seed: int = 1
    inner_optimizer: optim.SGD | optim.Adam | None = None
    inner_clip_norm: float | None = None

    def build(self) -> tuple[nn.Module, Tasks]:
        """The float32 model in train mode, and its meta-batch. Every call returns the same numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.model()
            draw_set = self.draw(self.tasks, self.seed)
            return model, Tasks(*draw_set(self.support), *draw_set(self.query))

    def shrunk(self) -> Workload:
        """The same network with at most two tasks, five samples and two inner steps, for quick runs."""
        small = {"tasks": 2, "support": 5, "query": 5, "inner_steps": 2}
        return dataclasses.replace(self, **{k: min(v, getattr(self, k)) for k, v in small.items()})


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class OmniglotNet(nn.Module):
    """Four blocks of strided convolution, BatchNorm, ReLU; spatial mean; Linear. x is `[N, 1, 28, 28]`."""

    def __init__(self, ways: int, filters: int = 64) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, filters, 3, stride=2, padding=1) for c in (1, *[filters] * 3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4))
        self.head = nn.Linear(filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class MiniImageNetNet(nn.Module):
    """Four blocks of convolution, BatchNorm, ReLU, max-pool 2; Linear. x is `[N, 3, side, side]`."""

    def __init__(self, ways: int, filters: int = 32, side: int = 84) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, filters, 3, padding=1) for c in (3, *[filters] * 3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4))
        self.head = nn.Linear((side // 16) ** 2 * filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return self.head(torch.flatten(x, 1))


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions and a 1x1 shortcut, each with BatchNorm; LeakyReLU; max-pool 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        channels = (inputs, outputs, outputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(channels[i], outputs, 3, padding=1, bias=False) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, track_running_stats=False) for _ in range(3))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(outputs, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.1)
        y = F.leaky_relu(self.norms[1](self.convs[1](y)), 0.1)
        y = self.norms[2](self.convs[2](y)) + self.shortcut_norm(self.shortcut(x))
        return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


class ResNet12(nn.Module):
    """The ResNet-12 of Lee et al. 2019 (arXiv 1904.03758) with narrower stages. x is `[N, 3, 32, 32]`."""

    def __init__(self, ways: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(ResidualBlock, (3, *widths[:-1]), widths))
        self.head = nn.Linear(widths[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class LastOfLSTM(nn.Module):
    """An LSTM over a sequence, and Linear on its last output. x is `[N, length, inputs]`."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def sinusoids(tasks: int, seed: int) -> DrawSet:
    """Regression of `amplitude * sin(x - phase)`, one curve per task: x and y are `[tasks, n, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=generator)

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(tasks, samples, 1, generator=generator) - 5
        return x, amplitude * torch.sin(x - phase)

    return draw_set


def navigation(tasks: int, seed: int) -> DrawSet:
    """Regression of the vector to the task's goal, in place of a policy loss: x and y are `[tasks, n, 2]`."""
    generator = torch.Generator().manual_seed(seed)
    goal = torch.rand(tasks, 1, 2, generator=generator) - 0.5

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, samples, 2, generator=generator) - 0.5
        return x, goal - x

    return draw_set


def sequences(length: int, inputs: int) -> Draw:
    """Regression of a weighted mean over a random walk, with weights of the task: x `[tasks, n, length, inputs]`."""
    return partial(draw_sequences, length, inputs)


def draw_sequences(length: int, inputs: int, tasks: int, seed: int) -> DrawSet:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(tasks, 1, inputs, 1, generator=generator) / inputs**0.5

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        steps = torch.randn(tasks, samples, length, inputs, generator=generator)
        x = steps.cumsum(2) / length**0.5
        return x, (x.mean(2, keepdim=True) @ weights).squeeze(2)

    return draw_set


def images(*shape: int, ways: int = 5) -> Draw:
    """Classification of noisy copies of one random image per class: x `[tasks, n, *shape]`, labels `[tasks, n]`."""
    return partial(draw_images, shape, ways)


def draw_images(shape: tuple[int, ...], ways: int, tasks: int, seed: int) -> DrawSet:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.rand(tasks, ways, *shape, generator=generator)

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(samples) % ways
        noise = torch.rand(tasks, samples, *shape, generator=generator)
        return (classes[:, labels] + noise) / 2, labels.repeat(tasks, 1)

    return draw_set


def fields(outputs: int) -> Draw:
    """Regression of smooth fields on the plane, a sum of waves per task: x `[tasks, n, 2]`, y `[tasks, n, outputs]`."""
    return partial(draw_fields, outputs)


def draw_fields(outputs: int, tasks: int, seed: int) -> DrawSet:
    generator = torch.Generator().manual_seed(seed)
    waves = 8
    frequencies = 2 * torch.pi * torch.randn(tasks, 2, waves, generator=generator)
    phases = 2 * torch.pi * torch.rand(tasks, 1, waves, generator=generator)
    amplitudes = torch.randn(tasks, waves, outputs, generator=generator) / waves

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(tasks, samples, 2, generator=generator) - 1
        return x, torch.sin(x @ frequencies + phases) @ amplitudes

    return draw_set


def maps(channels: int, side: int) -> Draw:
    """Regression of a map, a blurred mix of the channels: x `[tasks, n, channels, side, side]`, y of one channel."""
    return partial(draw_maps, channels, side)


def draw_maps(channels: int, side: int, tasks: int, seed: int) -> DrawSet:
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(tasks, 1, channels, 1, 1, generator=generator)

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, samples, channels, side, side, generator=generator)
        mixed = (x * mixture).sum(2, keepdim=True)
        return x, F.avg_pool2d(mixed.flatten(0, 1), 5, stride=1, padding=2).view_as(mixed)

    return draw_set


def travelling_waves(tasks: int, seed: int) -> DrawSet:
    """Solutions `u = c - a tanh(a (x - c t) / (2 nu))` of the Burgers equation, `a` and `c` of the task.

    x is `[tasks, n, 2]`, points `(x, t)`; y is `[tasks, n, 2]`, `u` and the residual, which is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    a, c = (0.2 + 0.8 * torch.rand(tasks, 1, generator=generator) for _ in range(2))

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        points = torch.rand(tasks, samples, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0])
        x, t = points.unbind(-1)
        u = c - a * torch.tanh(a * (x - c * t) / (2 * Burgers.VISCOSITY))
        return points, torch.stack((u, torch.zeros_like(u)), -1)

    return draw_set


def five_way(
    name: str, model: Callable[..., nn.Module], draw: Draw, steps: int, rate: float,
    tolerance: float = DEEP_TOLERANCE, **shape: int,
) -> Workload:  # fmt: skip
    """A 5-way 1-shot workload with four tasks; `shape` overrides."""
    return Workload(
        name, partial(model, 5), draw, "cross_entropy", **{"tasks": 4, "support": 5, "query": 75, **shape},
        inner_steps=steps, inner_lr=rate, float32_tolerance=tolerance,
    )  # fmt: skip


SINUSOID = Workload("sinusoid-k1", partial(mlp, (1, 40, 40, 1)), sinusoids, "mse", 25, 10, 10, 1, 0.01)
POLICY = Workload("policy", partial(mlp, (2, 100, 100, 2)), navigation, "mse", 20, 2000, 2000, 1, 0.1)
OMNIGLOT = five_way("omniglot", OmniglotNet, images(1, 28, 28), 5, 0.4)
MINI_IMAGENET = five_way("mini-imagenet", MiniImageNetNet, images(3, 84, 84), 5, 0.01)
RESNET12 = five_way("resnet12", ResNet12, images(3, 32, 32), 3, 0.01, query=25)
LSTM = Workload("lstm", partial(LastOfLSTM, 24, 64, 1), sequences(30, 24), "mse", 4, 10, 10, 5, 0.05)
TRANSFORMER = five_way("transformer", Transformer, images(32, 16), 5, 0.05, SMOOTH_TOLERANCE, query=15)
SIREN = Workload("siren", partial(Siren, (2, *[128] * 4, 3)), fields(3), "mse", 4, 1024, 1024, 5, 0.01)
GRADNCP = Workload("siren-gradncp", partial(Siren, (2, *[256] * 5, 3)), fields(3), "mse", 8, 1024, 1024, 4, 0.01)
MBCONV = five_way("mbconv", MobileNet, images(3, 32, 32), 5, 0.01, SMOOTH_TOLERANCE, query=25)
UNET = Workload("unet", UNet, maps(3, 32), "mse", 4, 5, 15, 5, 0.01, DEEP_TOLERANCE)
VIT = five_way("vit", ViT, images(3, 32, 32), 5, 0.05, SMOOTH_TOLERANCE, query=25)
PINN = Workload("pinn", partial(Burgers, (2, *[64] * 4, 1)), travelling_waves, "mse", 4, 256, 256, 5, 0.01)
replace = dataclasses.replace

WORKLOADS = {
    workload.name: workload
    for workload in (
        SINUSOID,
        replace(SINUSOID, name="sinusoid-k5", inner_steps=5),
        replace(SINUSOID, name="sinusoid-k1-t1000", tasks=1000),
        replace(SINUSOID, name="sinusoid-k5-t1000", tasks=1000, inner_steps=5),
        POLICY,
        OMNIGLOT,
        replace(OMNIGLOT, name="omniglot-t32", tasks=32),
        replace(
            OMNIGLOT, name="omniglot-20way", model=partial(OmniglotNet, 20), draw=images(1, 28, 28, ways=20),
            tasks=16, support=20, query=300, inner_lr=0.1,
        ),
        MINI_IMAGENET,
        replace(MINI_IMAGENET, name="mini-imagenet-5shot", tasks=2, support=25),
        RESNET12,
        LSTM,
        TRANSFORMER,
        replace(TRANSFORMER, name="transformer-k1", inner_steps=1),
        SIREN,
        GRADNCP,
        MBCONV,
        UNET,
        VIT,
        PINN,
        # Almost no arithmetic, to measure the cost of a call: six parameters, one task, one sample.
        replace(SINUSOID, name="overhead", tasks=1, support=1, query=1),
    )
}  # fmt: skip

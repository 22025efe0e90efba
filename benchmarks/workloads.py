"""The workloads: a model, the shapes of a meta-batch, and how its tasks are drawn.

Sinusoid, policy, Omniglot and mini-ImageNet follow Finn et al. 2017 (arXiv 1703.03400, section 5).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tasks(NamedTuple):
    """A meta-batch: inputs `[tasks, n, ...]`, targets `[tasks, n]` (labels) or `[tasks, n, outputs]`."""

    x_spt: Tensor
    y_spt: Tensor
    x_qry: Tensor
    y_qry: Tensor

    def double(self) -> Tasks:
        return Tasks(*(x.double() if x.is_floating_point() else x for x in self))


# One ReLU or argmax that flips between two correct float32 computations moves a deep net's meta-gradient:
# autograd's own differs from float64 by 1e-4 (Omniglot), 2e-2 (mini-ImageNet), 0.15 (ResNet-12).
FLIPS = 0.5


@dataclass(frozen=True)
class Workload:
    """One meta-step: `support` and `query` samples a task; `draw(tasks, seed)(n)` gives one set's x and y.

    `float32_limit` is the relative error of the meta-gradient that only a wrong kernel exceeds.
    """

    name: str
    model: Callable[[], nn.Module]
    draw: Callable[[int, int], Callable[[int], tuple[Tensor, Tensor]]]
    loss: str
    tasks: int
    support: int
    query: int
    inner_steps: int
    inner_lr: float
    float32_limit: float = 1e-4
    seed: int = 1

    def build(self) -> tuple[nn.Module, Tasks]:
        """The float32 model in train mode and its meta-batch: the same numbers at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.model()
            draw_set = self.draw(self.tasks, self.seed)
            return model, Tasks(*draw_set(self.support), *draw_set(self.query))

    def shrunk(self) -> Workload:
        """The same net on two tasks of at most five samples and two inner steps: a smoke test."""
        small = {"tasks": 2, "support": 5, "query": 5, "inner_steps": 2}
        return dataclasses.replace(self, **{k: min(v, getattr(self, k)) for k, v in small.items()})


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class OmniglotNet(nn.Module):
    """Four blocks of strided convolution, BatchNorm, ReLU; mean over space; Linear. x is `[N, 1, 28, 28]`."""

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
    """Four blocks of convolution, BatchNorm, ReLU, max-pool 2; Linear. x is `[N, 3, 84, 84]`."""

    def __init__(self, ways: int, filters: int = 32) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, filters, 3, padding=1) for c in (3, *[filters] * 3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4))
        self.head = nn.Linear(25 * filters, ways)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return self.head(torch.flatten(x, 1))


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions beside a 1x1 one, each with BatchNorm; LeakyReLU; max-pool 2."""

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


def sinusoids(tasks: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Regress `amplitude * sin(x - phase)`, one curve a task: x and y are `[tasks, n, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=generator)

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(tasks, samples, 1, generator=generator) - 5
        return x, amplitude * torch.sin(x - phase)

    return draw_set


def navigation(tasks: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Regress the way to the task's goal, in place of a policy loss: x and y are `[tasks, n, 2]`."""
    generator = torch.Generator().manual_seed(seed)
    goal = torch.rand(tasks, 1, 2, generator=generator) - 0.5

    def draw_set(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, samples, 2, generator=generator) - 0.5
        return x, goal - x

    return draw_set


def images(*shape: int, ways: int = 5) -> Callable[[int, int], Callable[[int], tuple[Tensor, Tensor]]]:
    """Classify noisy copies of one random image a class: x is `[tasks, n, *shape]`, y labels `[tasks, n]`."""

    def draw(tasks: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        classes = torch.rand(tasks, ways, *shape, generator=generator)

        def draw_set(samples: int) -> tuple[Tensor, Tensor]:
            labels = torch.arange(samples) % ways
            noise = torch.rand(tasks, samples, *shape, generator=generator)
            return (classes[:, labels] + noise) / 2, labels.repeat(tasks, 1)

        return draw_set

    return draw


SINUSOID = Workload("sinusoid-k1", lambda: mlp((1, 40, 40, 1)), sinusoids, "mse", 25, 10, 10, 1, 0.01)
POLICY = Workload("policy", lambda: mlp((2, 100, 100, 2)), navigation, "mse", 20, 2000, 2000, 1, 0.1)
OMNIGLOT = Workload("omniglot", lambda: OmniglotNet(5), images(1, 28, 28), "cross_entropy", 4, 5, 75, 5, 0.4, FLIPS)
MINI_IMAGENET = Workload(
    "mini-imagenet", lambda: MiniImageNetNet(5), images(3, 84, 84), "cross_entropy", 4, 5, 75, 5, 0.01, FLIPS
)
RESNET12 = Workload("resnet12", lambda: ResNet12(5), images(3, 32, 32), "cross_entropy", 4, 5, 25, 3, 0.01, FLIPS)
# Almost no arithmetic: what a call costs in Python. Six parameters, one task, one sample.
OVERHEAD = dataclasses.replace(SINUSOID, name="overhead", tasks=1, support=1, query=1)

WORKLOADS = {
    workload.name: workload
    for workload in (
        SINUSOID,
        dataclasses.replace(SINUSOID, name="sinusoid-k5", inner_steps=5),
        POLICY,
        OMNIGLOT,
        MINI_IMAGENET,
        RESNET12,
        OVERHEAD,
    )
}

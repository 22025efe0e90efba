"""Random plans: small graphs of every fused layer, shape and option, each drawn from its number alone.

As tests/engine/test_fuzz.py draws them, with the standard library's generator, so that two versions meet the same
plans. Here a net may have normalisations and kinks: two versions with the same bits are on the same side of every kink.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import PolicyTarget

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.GELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Identity,
    partial(nn.LeakyReLU, 0.1), partial(nn.ELU, 0.5), partial(nn.CELU, 0.7), partial(nn.GELU, "tanh"),
]  # fmt: skip
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORM: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
INSTANCE_NORM: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}
MAX_POOL: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
AVG_POOL: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
TO_ONE: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}
WIDE = (16, 17, 32, 40, 64)  # channels of whole and of broken registers
LOSSES = ("cross_entropy", "mse", "gaussian_policy_gradient", "categorical_policy_gradient")


class Random(random.Random):
    """The standard library's generator, with two more draws."""

    def maybe(self, probability: float = 0.5) -> bool:
        return self.random() < probability

    def width(self, most: int) -> int:
        """A number of channels or features: mostly few."""
        return self.choice(WIDE) if self.maybe(0.2) else self.randint(1, most)


@dataclass(frozen=True)
class Plan:
    """A model, its meta-batch, and how it is learned: `options` are FusedMAML's, `task_weights` is of its calls."""

    model: nn.Module
    data: list[Any]
    options: dict[str, Any]
    task_weights: Tensor | None


class Graph(nn.Module):
    """Layers in a row; `skips[i]` adds the value before layer i to its result. With log_std it is a Gaussian policy."""

    def __init__(self, layers: list[nn.Module], skips: list[bool], log_std: Tensor | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips = skips
        self.log_std = None if log_std is None else nn.Parameter(log_std)

    def forward(self, x: Tensor) -> Any:
        for layer, skip in zip(self.layers, self.skips, strict=True):
            x = layer(x) + x if skip else layer(x)
        return x if self.log_std is None else (x, self.log_std)


class Layers:
    """The layers drawn so far, and the shape of a sample behind them: channels and sizes."""

    def __init__(self, rng: Random, channels: int, sizes: tuple[int, ...]) -> None:
        self.rng, self.channels, self.sizes = rng, channels, sizes
        self.layers: list[nn.Module] = []
        self.skips: list[bool] = []

    def add(self, layer: nn.Module, may_skip: bool = False) -> None:
        self.layers.append(layer)
        self.skips.append(may_skip and self.rng.maybe())

    def spatial(self) -> None:
        """Up to five layers on a signal or an image, then the way to features."""
        for _ in range(self.rng.randint(1, 5)):
            kinds = (self.conv, self.conv, self.same_conv, self.activation, self.activation, self.norm, self.pool)
            self.rng.choice(kinds)()
        if self.rng.maybe():
            self.add(TO_ONE[len(self.sizes)](1))
            self.sizes = (1,) * len(self.sizes)
        self.add(nn.Flatten())
        self.channels, self.sizes = self.channels * math.prod(self.sizes), ()

    def conv(self) -> None:
        rng, out = self.rng, self.rng.width(9)
        kernel = tuple(rng.randint(1, min(4, size)) for size in self.sizes)
        stride = tuple(rng.randint(1, 3) for _ in self.sizes)
        padding = tuple(rng.randint(0, 2) for _ in self.sizes)
        self.add(CONV[len(self.sizes)](self.channels, out, kernel, stride, padding, bias=rng.maybe()))
        self.channels = out
        self._slide(kernel, stride, padding)

    def same_conv(self) -> None:
        """Of stride 1, whose result has the shape of its input."""
        layer = CONV[len(self.sizes)](self.channels, self.channels, self.rng.choice((1, 3, 3, 5)), padding="same")
        self.add(layer, may_skip=True)
        if self.rng.maybe(0.1):  # one weight in two places
            self.add(layer, may_skip=True)

    def pool(self) -> None:
        rng, axes = self.rng, len(self.sizes)
        kernel = rng.randint(1, min(3, *self.sizes))
        stride, padding = rng.randint(1, 3), rng.randint(0, kernel // 2)
        self.add(rng.choice((MAX_POOL, AVG_POOL))[axes](kernel, stride, padding))
        self._slide((kernel,) * axes, (stride,) * axes, (padding,) * axes)

    def linear(self) -> None:
        width = self.rng.width(20)
        self.add(nn.Linear(self.channels, width, bias=self.rng.maybe()))
        self.channels = width

    def activation(self) -> None:
        self.add(self.rng.choice(ACTIVATIONS)(), may_skip=True)

    def norm(self) -> None:
        """Over the samples, by running statistics, or within each sample."""
        rng, channels, sizes = self.rng, self.channels, self.sizes
        kinds = ["batch", "running", "group", "layer", *(["instance"] if math.prod(sizes) > 1 else [])]
        kind, affine = rng.choice(kinds), rng.maybe()
        layer: Any
        if kind == "group":
            groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
            layer = nn.GroupNorm(groups, channels, eps=0.1, affine=affine)
        elif kind == "layer":
            layer = nn.LayerNorm([channels, *sizes], eps=0.1, elementwise_affine=affine)
        elif kind == "instance":
            layer = INSTANCE_NORM[len(sizes)](channels, eps=0.1, affine=affine)
        else:
            layer = BATCH_NORM[len(sizes)](channels, eps=0.1, affine=affine)
        if kind == "running":
            layer.eval()
            layer.num_batches_tracked += 1
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        self.add(layer, may_skip=True)

    def _slide(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        moves = zip(self.sizes, kernel, stride, padding, strict=True)
        self.sizes = tuple((size + 2 * p - k) // s + 1 for size, k, s, p in moves)


def draw(number: int) -> Plan:
    """Plan `number`: the same in every process with the same torch."""
    rng = Random(number)
    with torch.random.fork_rng(devices=[]):
        while True:
            torch.manual_seed(rng.randrange(2**32))
            plan = _draw(rng)
            if _torch_takes(plan):
                return plan


def _torch_takes(plan: Plan) -> bool:
    """Torch refuses batch statistics of one value per channel."""
    try:
        with torch.no_grad():
            for x in (plan.data[0], plan.data[2]):
                copy.deepcopy(plan.model)(x[0])
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    return True


def _draw(rng: Random) -> Plan:
    axes = rng.choice((0, 1, 2, 2))
    sample = (rng.randint(1, 4) if axes else rng.width(20), *(rng.randint(1, 9) for _ in range(axes)))
    net = Layers(rng, sample[0], sample[1:])
    if axes:
        net.spatial()
    for _ in range(rng.randint(0, 2)):
        net.linear()
        if rng.maybe(0.3):
            net.norm()
        net.activation()
    classes, loss = rng.randint(1, 6), rng.choice(LOSSES)
    net.add(nn.Linear(net.channels, classes))
    log_std = 0.3 * torch.randn(classes) if loss == "gaussian_policy_gradient" else None
    dtype = rng.choice((torch.float32, torch.float64))
    model = Graph(net.layers, net.skips, log_std).to(dtype)
    tasks, counts, steps = rng.randint(1, 4), (rng.randint(2, 6), rng.randint(2, 6)), rng.randint(0, 3)
    data: list[Any] = []
    for samples in counts:
        data += [torch.randn(tasks, samples, *sample).to(dtype), _target(rng, loss, tasks, samples, classes, dtype)]
    options = {"loss": loss, "inner_steps": steps, "first_order": rng.maybe(0.3), **_learned(rng, model, loss, steps)}
    if rng.maybe(0.2):
        options["checkpoint"] = "recompute"
    if rng.maybe(0.2):
        options["query_weights"] = [rng.random() for _ in range(steps + 1)]
    return Plan(model, data, options, torch.rand(tasks).to(dtype) if rng.maybe(0.3) else None)


def _target(rng: Random, loss: str, tasks: int, samples: int, classes: int, dtype: torch.dtype) -> Any:
    labels = torch.randint(classes, (tasks, samples))
    numbers = torch.randn(tasks, samples, classes).to(dtype)
    if loss in ("cross_entropy", "mse"):
        return labels if loss == "cross_entropy" else numbers
    old = (0.3 * torch.randn(tasks, samples) - 1).to(dtype) if rng.maybe() else None
    weights = torch.rand(tasks, samples).to(dtype) if rng.maybe() else None
    actions = numbers if loss == "gaussian_policy_gradient" else labels
    return PolicyTarget(actions, torch.randn(tasks, samples).to(dtype), old, weights)


def _learned(rng: Random, model: nn.Module, loss: str, steps: int) -> dict[str, Any]:
    """What is frozen, what is adapted, and at which rates."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = list(shapes)
    normed = any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    if normed and "policy" not in loss and rng.maybe(0.3):  # Fisher products know no slots for each step
        return {"inner_lr": 0.1, "batch_norm": "per_step"}
    if rng.maybe(0.3):
        for name in rng.sample(names, rng.randint(0, len(names) - 1)):
            model.get_parameter(name).requires_grad_(False)
    names = [name for name in names if model.get_parameter(name).requires_grad]
    adapted = rng.sample(names, rng.randint(1, len(names))) if rng.maybe() else None
    if rng.maybe():
        return {"inner_lr": 0.1, "adapt_params": adapted}
    dtype = next(model.parameters()).dtype

    def rate(shape: torch.Size) -> float | nn.Parameter:
        # A vector of as many numbers as there are steps could be read in two ways, and is refused.
        forms = [None, (), *([] if shape == (steps,) else [(steps,), shape, (steps, *shape)])]
        form = rng.choice(forms)
        return 0.05 if form is None else nn.Parameter(0.1 * torch.rand(form).to(dtype))

    return {"inner_lr": {name: rate(shapes[name]) for name in adapted or names}, "adapt_params": adapted}

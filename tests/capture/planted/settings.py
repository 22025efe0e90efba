"""Ten small models, and how a fault is planted in one of them.

Every model is head(middle(body(x))). `middle` returns its argument; most faults are another `middle`, as a method of a
subclass. Others change the model after it was made, replace its loss, or change something between two calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maml_cuda.targets import PolicyTarget

TASKS, CLASSES = 2, 4


class Setting(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def middle(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Any:
        return self.head(self.middle(self.body(x)))


def conv_block(inputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]


class Residual(nn.Module):
    """[n, 2, h, w] -> [n, 3, h, w]"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.shortcut = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm_a(self.a(x)))
        return torch.relu(self.norm_b(self.b(h)) + self.shortcut(x))


class Gaussian(nn.Module):
    """[n, 5] -> mean [n, 2], log_std [2]"""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(5, 2), nn.Parameter(torch.tensor([-0.3, 0.2]))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(h), self.log_std


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def shared_body() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh())


@dataclass(frozen=True)
class Shape:
    """How a setting is made, and its data: the shapes of a sample and of a target (None: labels)."""

    body: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    sample: tuple[int, ...] = (3,)
    target: tuple[int, ...] | None = None
    loss: str = "cross_entropy"


SETTINGS: dict[str, Shape] = {
    "mlp": Shape(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh()), lambda: nn.Linear(5, CLASSES)),
    "conv4": Shape(
        lambda: nn.Sequential(*conv_block(2), *conv_block(3), *conv_block(3), *conv_block(3)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, CLASSES)),
        (2, 16, 16),
    ),
    "conv1d": Shape(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(2)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)),
        (2, 9),
    ),
    "layer norm": Shape(
        lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU()), lambda: nn.Linear(6, CLASSES)
    ),
    "resnet": Shape(
        Residual,
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)),
        (2, 6, 6),
    ),
    "group norm": Shape(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.SiLU()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)),
        (2, 5, 5),
    ),
    "policy": Shape(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh()), Gaussian, target=(2,), loss="gaussian_policy_gradient"
    ),
    "shared": Shape(shared_body, lambda: nn.Linear(5, CLASSES)),
    "regression": Shape(
        lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh()), lambda: nn.Linear(6, 2), (2,), (2,), "mse"
    ),
    "nested": Shape(
        lambda: Wrapped(Wrapped(nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()))), lambda: nn.Linear(5, CLASSES)
    ),
}  # fmt: skip


def nothing(model: Any) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """One hidden fault.

    Attributes:
        kind, on: what it is, and the setting that it is planted in.
        words: a regular expression; a refusal must name one of these.
        methods: of the model's class, in place of the setting's.
        plant: changes the new model, and sets global state to where it starts.
        between: what changes before the second call.
        loss: makes the loss of a model; None: the setting's.
        sizes: (n_support, n_query) of each of the two calls.
        around: a context of the first call.
    """

    kind: str
    on: str
    words: str = ""
    methods: dict[str, Any] = field(default_factory=dict)
    plant: Callable[[Any], object] = nothing
    between: Callable[[Any], object] = nothing
    loss: Callable[[Any], Any] | None = None
    sizes: tuple[tuple[int, int], ...] = ((4, 3), (4, 3))
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def made(self) -> tuple[nn.Module, Any]:
        """A new model and its loss, the same at every call."""
        seed(0)
        shape = SETTINGS[self.on]
        model = type("Planted", (Setting,), self.methods)(shape.body(), shape.head()).double()
        self.plant(model)
        return model, shape.loss if self.loss is None else self.loss(model)

    def data(self, call: int) -> list[Any]:
        """x_spt, y_spt, x_qry, y_qry of the first or second call."""
        shape, generator = SETTINGS[self.on], torch.Generator().manual_seed(call)
        tensors: list[Any] = []
        for n in self.sizes[call]:
            tensors.append(torch.randn(TASKS, n, *shape.sample, generator=generator).double())
            if shape.target is None:
                tensors.append(torch.randint(CLASSES, (TASKS, n), generator=generator))
                continue
            real = torch.randn(TASKS, n, *shape.target, generator=generator).double()
            advantages = torch.randn(TASKS, n, generator=generator).double()
            tensors.append(PolicyTarget(real, advantages) if shape.loss != "mse" else real)
        return tensors


CASES: dict[str, Fault] = {name: Fault("none", name) for name in SETTINGS}


def add(name: str, kind: str, on: str, words: str, **rest: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Fault(kind, on, words, **rest)


def fault(kind: str, on: str, words: str, **rest: Any) -> Callable[[Any], Any]:
    """A decorator: the function is the `middle` (or, if its argument is called x, the `forward`) of a model with a
    fault, which its name describes."""

    def register(function: Any) -> Any:
        takes = function.__code__.co_varnames[1]
        methods = {"forward" if takes == "x" else "middle": function}
        add(function.__name__.replace("_", " "), kind, on, words, methods=methods, **rest)
        return function

    return register


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)

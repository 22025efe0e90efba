"""Faults: constant tensors, which may change between two calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.planted.settings import add, fault

# -- constant tensors ---------------------------------------------------------------------------------------------

CONSTANT = "constant tensors"


@fault(CONSTANT, "mlp", "arange|constant|mul")
def made_in_forward(self: Any, h: Tensor) -> Tensor:
    return h * torch.arange(5, dtype=h.dtype)


@fault(
    CONSTANT, "layer norm", "values|tensor", plant=lambda m: setattr(m, "values", [1.0] * 6),
    between=lambda m: m.values.__setitem__(0, 9.0),
)  # fmt: skip
def made_of_a_list_that_changes(self: Any, h: Tensor) -> Tensor:
    return h * torch.tensor(self.values)


def with_tensor(model: Any) -> None:
    model.position = torch.ones(3, 1, 1, dtype=torch.float64)


@fault(CONSTANT, "conv4", "position", plant=with_tensor, between=lambda m: m.position.mul_(2.5))
def an_attribute_changed_in_place(self: Any, h: Tensor) -> Tensor:
    return h * self.position


@fault(CONSTANT, "resnet", "position", plant=with_tensor, between=lambda m: setattr(m, "position", m.position * 2.5))
def an_attribute_replaced(self: Any, h: Tensor) -> Tensor:
    return h * self.position


@fault(
    CONSTANT, "shared", "table|position", plant=lambda m: setattr(m, "table", {"a": [torch.ones(5).double()]}),
    between=lambda m: m.table["a"][0].add_(1),
)  # fmt: skip
def in_a_container_of_the_model(self: Any, h: Tensor) -> Tensor:
    return h * self.table["a"][0]


POSITION = torch.ones(6, dtype=torch.float64)


@fault(CONSTANT, "regression", "POSITION", plant=lambda m: POSITION.fill_(1), between=lambda m: POSITION.fill_(2.5))
def a_global_tensor_changed_in_place(self: Any, h: Tensor) -> Tensor:
    return h * POSITION


@fault(CONSTANT, "nested", "array|numpy", plant=lambda m: with_array(m), between=lambda m: m.array.fill(2.5))
def a_numpy_array(self: Any, h: Tensor) -> Tensor:
    return h * torch.from_numpy(self.array)


def with_array(model: Any) -> None:
    model.array = np.ones(5)


def share_memory(model: Any) -> None:
    model.alias = model.head.weight.detach()


def step(model: Any) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1.5)


@fault(CONSTANT, "mlp", "alias|linear", plant=share_memory, between=step)
def the_memory_of_a_parameter(self: Any, h: Tensor) -> Tensor:
    """As an optimizer's step changes it."""
    return h + F.linear(h, self.alias).sum(-1, keepdim=True)


def with_leaf(model: Any) -> None:
    model.shift = torch.zeros(16, dtype=torch.float64).add(0.3).requires_grad_()


@fault(CONSTANT, "group norm", "shift|requires", plant=with_leaf)
def an_attribute_that_requires_grad(self: Any, h: Tensor) -> Tensor:
    return h + self.shift.view(4, 2, 2)


def freeze(model: Any) -> None:
    model.body[0].weight.requires_grad_(False)


def write_frozen(model: Any) -> None:
    model.body[0].weight.mul_(2)


add("a frozen parameter changed between calls", CONSTANT, "policy", "weight", plant=freeze, between=write_frozen)
add("a parameter frozen between calls", CONSTANT, "mlp", "weight", between=freeze)
add("a parameter frozen at first", CONSTANT, "mlp", "weight", plant=freeze, between=lambda m: m.requires_grad_(True))

"""Sides of a benchmark that lie, fail, hang or die; functions of a module, because they travel to processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.rivals import autograd_loop


def _spoiled(spoil: Callable[[torch.nn.Parameter], object], workload: Any, model: Any, tasks: Any, first: bool) -> Any:
    """The loop, its first gradient spoiled after each step."""
    step = autograd_loop(workload, model, tasks, first)

    def spoiled_step() -> None:
        step()
        spoil(next(model.parameters()))

    return spoiled_step


def _scale(factor: float, p: torch.nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.mul_(factor)


def _drop(p: torch.nn.Parameter) -> None:
    p.grad = None


def _double_in_float32(p: torch.nn.Parameter) -> None:
    if p.dtype == torch.float32:
        _scale(2, p)


slightly_wrong = partial(_spoiled, partial(_scale, 1 + 1e-6))
not_a_number = partial(_spoiled, partial(_scale, float("nan")))
without_gradient = partial(_spoiled, _drop)
wrong_in_float32 = partial(_spoiled, _double_in_float32)


def posing(workload: Any, model: Any, tasks: Any, first_order: bool) -> Any:
    """First order as second."""
    return autograd_loop(workload, model, tasks, True)


def failing(*_: Any) -> Any:
    raise RuntimeError("out of luck")


def lacking(*_: Any) -> Any:
    raise ModuleNotFoundError("No module named 'gone'")


def hanging(*_: Any) -> Any:
    time.sleep(600)


def dying(*_: Any) -> Any:
    os._exit(7)


def tiring(workload: Any, model: Any, tasks: Any, first_order: bool) -> Any:
    """Right at first, then it raises."""
    step = autograd_loop(workload, model, tasks, first_order)
    turns = iter(range(3))

    def tiring_step() -> None:
        if next(turns, None) is None:
            raise RuntimeError("tired")
        step()

    return tiring_step

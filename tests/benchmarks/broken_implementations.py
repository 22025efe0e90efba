"""Implementations that are wrong, fail, hang or crash. Functions of a module, so that they can be pickled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from maml_cuda.benchmark.baselines import autograd_loop


def _changed(change: Callable[[torch.nn.Parameter], object], workload: Any, model: Any, tasks: Any, first: bool) -> Any:
    """The autograd loop; `change` modifies its first gradient after each step."""
    step = autograd_loop(workload, model, tasks, first)

    def changed_step() -> None:
        step()
        change(next(model.parameters()))

    return changed_step


def _scale(factor: float, p: torch.nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.mul_(factor)


def _drop(p: torch.nn.Parameter) -> None:
    p.grad = None


def _double_in_float32(p: torch.nn.Parameter) -> None:
    if p.dtype == torch.float32:
        _scale(2, p)


slightly_wrong = partial(_changed, partial(_scale, 1 + 1e-6))
not_a_number = partial(_changed, partial(_scale, float("nan")))
without_gradient = partial(_changed, _drop)
wrong_in_float32 = partial(_changed, _double_in_float32)


def first_order_only(workload: Any, model: Any, tasks: Any, first_order: bool) -> Any:
    """Ignores the requested order."""
    return autograd_loop(workload, model, tasks, True)


def failing(*_: Any) -> Any:
    raise RuntimeError("a planted error")


def missing(*_: Any) -> Any:
    raise ModuleNotFoundError("No module named 'absent'")


def hanging(*_: Any) -> Any:
    time.sleep(600)


def crashing(*_: Any) -> Any:
    os._exit(7)


def failing_later(workload: Any, model: Any, tasks: Any, first_order: bool) -> Any:
    """Correct for three steps, then raises."""
    step = autograd_loop(workload, model, tasks, first_order)
    calls = iter(range(3))

    def later_failing_step() -> None:
        if next(calls, None) is None:
            raise RuntimeError("a planted later error")
        step()

    return later_failing_step

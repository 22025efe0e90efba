"""Models whose operations hide an effect: writes in place, stopped derivatives. Their gradients are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.plan.small_models import RATE, STEPS, dense, episode, made, right

pytestmark = pytest.mark.usefixtures("one_thread")


def alias_plus_equals(m: Any, x: Tensor) -> Tensor:
    h, b = m.a(x), m.b(x)
    alias = h
    alias += b  # changes h as well
    return m.c(torch.tanh(h)) + m.c(b)


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
    return m.c(torch.tanh(h) + m.b(x))


def set_grad(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not m.training):
        h = m.a(x)
    return m.c(torch.tanh(h) + m.b(x))


def plain(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.a(x) + m.b(x)))


DISGUISED: dict[str, Callable[[], nn.Module]] = {
    "+= through another name": lambda: dense(alias_plus_equals),
    "no_grad around a layer": lambda: dense(without_grad),
    "set_grad_enabled around a layer": lambda: dense(set_grad),
    "torch.relu_ whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (torch.relu_(h), m.c(h) + m.c(m.b(x)))[1])(m.a(x))
    ),
    "F.relu(h, True) whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (F.relu(h, True), m.c(h) + m.c(m.b(x)))[1])(m.a(x))
    ),
    "h.add_ whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (h.add_(m.b(x)), m.c(h))[1])(m.a(x))
    ),
    "in-place module whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (m.r(h), m.c(h) + m.c(m.b(x)))[1])(m.a(x)), r=nn.ReLU(inplace=True)
    ),
    "an item set": lambda: dense(
        lambda m, x: (lambda h: (h.__setitem__(0, 0.0), m.c(h) + m.c(m.b(x)))[1])(m.a(x))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DISGUISED)
def test_never_wrong(case: str) -> None:
    right(FusedMAML(made(DISGUISED[case]), RATE, STEPS, adapt_params=["c.weight", "c.bias"]), episode())


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_every_module_there_is(register: str) -> None:
    def hook(module: nn.Module, *arguments: Any) -> Any:
        if not isinstance(module, nn.Linear):
            return None
        value = arguments[-1]
        return value * 1.5 if isinstance(value, Tensor) else (value[0] * 1.5,)

    handle = getattr(nn.modules.module, register)(hook)
    try:
        right(FusedMAML(made(lambda: dense(plain)), RATE, STEPS), episode())
    finally:
        handle.remove()

"""Models, episodes and the check that a bad call is refused, shared by the tests of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import conftest

TASKS, SUPPORT, QUERY, FEATURES, CLASSES = 2, 4, 3, 3, 5
BACKENDS = ("auto", "reference")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES)).double()


def episode(*sample: int, loss: str = "cross_entropy", n_support: int = SUPPORT) -> dict[str, Tensor]:
    target, n = (CLASSES,) if loss == "mse" else None, (n_support, QUERY)
    data = conftest.episode(sample or (FEATURES,), tasks=TASKS, n=n, classes=CLASSES, target=target, seed=1)
    return dict(zip(("x_spt", "y_spt", "x_qry", "y_qry"), data, strict=True))


def state(module: nn.Module) -> list[Any]:
    """Everything that a refused call must not change: random state, tensors, flags, attributes, backend."""
    tensors = [
        *module.parameters(),
        *module.buffers(),
        *(p.grad for p in module.parameters() if p.grad is not None),
    ]
    return [
        torch.get_rng_state().tolist(),
        [(id(t), t.dtype, t.requires_grad, t.detach().clone().tolist()) for t in tensors],
        [(name, m.training, sorted(vars(m)), list(m._modules)) for name, m in module.named_modules()],
        torch.is_grad_enabled(),
        getattr(module, "backend", None),
    ]


def refuses(module: nn.Module, call: Callable[[], object], error: type[Exception], *pieces: str) -> None:
    """Asserts that `call` raises `error`, that its text has `pieces` in this order, and that `module` is unchanged."""
    for p in module.parameters():
        if p.is_floating_point():
            p.grad = torch.full_like(p, 0.25)
    before = state(module)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text, at = str(caught.value), 0
    for piece in pieces:
        assert piece in text[at:], f"{piece!r} is not in its place in: {text}"
        at = text.index(piece, at) + len(piece)
    assert state(module) == before


def dict_of_rates(**changes: Any) -> dict[str, Any]:
    rates: dict[str, Any] = {name: 0.1 for name, _ in net().named_parameters()}
    for name, rate in changes.items():
        rates[name.replace("_", ".")] = rate
    return rates


def change(name: str, to: Callable[[Tensor], Any]) -> Callable[[dict], dict]:
    return lambda data: data | {name: to(data[name])}


def label(name: str, value: int) -> Callable[[dict], dict]:
    def put(data: dict) -> dict:
        y = data[name].clone()
        y[1, 2] = value
        return data | {name: y}

    return put

"""inner_loop yields every phi_k with the bits that `adapt` returns, on every backend."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.engine import building_blocks

STEPS = 4


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip


SAMPLE = {mlp: (4,), conv: (2, 7, 7)}
HOW: list[tuple[Any, dict[str, Any]]] = [
    (mlp, {}),
    (mlp, {"inner_lr": torch.linspace(0.1, 0.3, 3)}),
    (mlp, {"inner_lr": {"2.bias": torch.rand(3, 3), "2.weight": 0.2}, "adapt_params": ["2.bias", "2.weight"]}),
    (mlp, {"backend": "reference"}),
    (conv, {}),
    (conv, {"adapt_params": lambda name: name.startswith("8.")}),
    (conv, {"batch_norm": "per_step", "inner_lr": nn.Parameter(torch.linspace(0.1, 0.3, 3))}),
]


def episode(sample: tuple[int, ...], dtype: torch.dtype, tasks: int = 3, n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, n, *sample, dtype=dtype), torch.randint(3, (tasks, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "how"), HOW)
def test_each_step_is_what_adapt_gives(machine: str, make: Any, how: dict[str, Any], dtype: torch.dtype) -> None:
    maml = FusedMAML(make().to(dtype), **({"inner_lr": 0.2, "inner_steps": 3, "backend": "fused"} | how))
    x, y = episode(SAMPLE[make], dtype)
    walked = list(maml.inner_loop(x, y, STEPS))
    assert len(walked) == STEPS + 1
    for k, fast in enumerate(walked):
        expected = maml.adapt(x, y, steps=k)
        assert list(fast) == list(expected)
        assert all(torch.equal(fast[name], p) for name, p in expected.items())
        assert not any(p.requires_grad for p in fast.values())
    adapted = how.get("adapt_params") or (lambda name: True)
    moved = [name for name in walked[0] if not torch.equal(walked[0][name], walked[-1][name])]
    assert moved
    assert all(adapted(name) if callable(adapted) else name in adapted for name in moved)


def test_no_step_is_taken_twice() -> None:
    maml = FusedMAML(mlp(), 0.2, 2, backend="fused")
    x, y = episode((4,), torch.float32)
    with mock.patch.object(building_blocks, "_adapt", side_effect=building_blocks._adapt) as adapt:
        list(maml.inner_loop(x, y, 3))
    assert [call.args[4] for call in adapt.call_args_list] == [0]


def test_what_cannot_be_walked_is_refused() -> None:
    maml = FusedMAML(mlp(), torch.zeros(0), 0)
    x, y = episode((4,), torch.float32)
    with pytest.raises(ValueError, match=r"inner_lr must hold a value for 2 steps, got one of shape \[0\]"):
        list(maml.inner_loop(x, y, 2))
    with pytest.raises(ValueError, match="steps must be"):
        list(FusedMAML(mlp(), 0.1, 1).inner_loop(x, y, -1))
    with pytest.raises(ValueError, match="y_spt must"):
        list(FusedMAML(mlp(), 0.1, 1).inner_loop(x, y[:, :2], 1))

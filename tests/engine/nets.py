"""Small nets, learned rates and one training step, shared by the tests of FusedMAML's behaviour."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import conftest

CLASSES = 4
BACKENDS = ("auto", "reference")


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES)).to(dtype)


def image_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(45, CLASSES),
    ).to(dtype)  # fmt: skip


episode = functools.partial(conftest.episode, seed=0)  # the same data at every call


def dotted_rates() -> dict[str, Any]:
    """Every form of rate in one dict, for net() and 2 inner steps."""
    torch.manual_seed(5)
    return {
        "0.weight": nn.Parameter(torch.rand(2, 7, 3).double()),
        "0.bias": nn.Parameter(torch.rand(7).double()),
        "1.weight": nn.Parameter(torch.tensor(0.2).double()),
        "1.bias": torch.tensor([0.1, 0.3]).double(),
        "3.weight": 0.25,
        "3.bias": nn.Parameter(torch.rand(2).double()),
    }


def learned(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values if len(values) > 1 else values[0]).double())


def gradients(maml: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in maml.named_parameters() if p.grad is not None}


def step(
    maml: nn.Module, data: list[Tensor], call: Callable[..., Any] | None = None, **given: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one call of maml, or of `call`, which is maml compiled."""
    maml.zero_grad()
    loss = (maml if call is None else call)(*data, **given).loss
    loss.backward()
    return loss.detach(), gradients(maml)


def equal(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Asserts the same bits."""
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, g in got[1].items():
        assert torch.equal(g, expected[1][name]), name


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda m: f"{what}: {m}")

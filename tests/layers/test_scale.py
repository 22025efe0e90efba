"""scale: a number times a value, in every way to write it."""

import operator

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML


class Scaled(nn.Module):
    """`between` two layers."""

    def __init__(self, first: nn.Module, between, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


WAYS = {
    "value * number": lambda h: h * 0.3,
    "number * value": lambda h: -1.7 * h,
    "integer": lambda h: 3 * h,
    "torch.mul": lambda h: torch.mul(h, 0.3),
    "method": lambda h: h.mul(0.3),
    "negated": lambda h: -h,
    "torch.neg": lambda h: torch.neg(h),
    "before a function": lambda h: torch.relu(h * -0.3),
    "twice": lambda h: h * 0.3 + 2 * h,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 17])
def test_passes(check_passes, way, n):
    check_passes(Scaled(nn.Linear(2, 9), WAYS[way], nn.Linear(9, 3)), (2,), n)
    check_passes(Scaled(nn.Conv2d(2, 3, 2), WAYS[way], nn.Conv2d(3, 2, 1)), (2, 4, 3), n)


def test_of_the_input(check_passes):
    check_passes(Scaled(nn.Identity(), lambda x: 0.5 * x, nn.Conv2d(2, 3, 2)), (2, 4, 3), 3)


@pytest.mark.parametrize(
    "between", [lambda h: h * h, lambda h: operator.mul(h, torch.full((), 0.3)), lambda h: h * True]
)
def test_other_products(check_passes, between):
    """Of two values, with a tensor made in forward, with a number that is none."""
    check_passes(Scaled(nn.Linear(2, 3), between, nn.Linear(3, 2)), (2,), 5)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_explain_names_it():
    maml = FusedMAML(nn.Sequential(nn.Linear(2, 3), Twice(), nn.Linear(3, 2)), 0.1, backend="fused")
    assert "Twice   scale" in maml.explain(torch.ones(1, 2, 2))

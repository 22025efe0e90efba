"""Sums and products of the elements of an axis, of all and of those so far."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.layers.test_convolutions import between
from tests.layers.test_resampling import Applied

FUNCTIONS = {
    "sums": lambda x: x.cumsum(1),
    "sums of the last axis": lambda x: x.cumsum(-1),
    "sums of one element": lambda x: x[:, :, :1].cumsum(2) + x,
    "long sums": lambda x: x.flatten(2).repeat(1, 1, 40).cumsum(2)[:, :, ::40].unflatten(2, x.shape[2:]) / 100,
    "long sums of an axis inside": lambda x: x.repeat(1, 1, 211, 1).cumsum(2)[:, :, ::211] / 100,
    "products": lambda x: x.cumprod(1),
    "products of the last axis": lambda x: (1 + x).cumprod(-1),
    "a product": lambda x: x * x.prod(1, keepdim=True),
    "a product of the last axis": lambda x: x + (1 + x).prod(-1).unsqueeze(-1),
    "a product of one element": lambda x: x * x[:, :1].prod(1, keepdim=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_four_passes(check_passes, name):
    check_passes(between(Applied(FUNCTIONS[name]), 2), (3, 5, 6), n=2)


class Whole(nn.Module):
    """x of whole numbers, among them zeros, times weights of the task."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.scale = name, nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        return y.cumprod(1) if self.name == "cumprod" else y.prod(1, keepdim=True) * torch.ones(5).double()


@pytest.mark.parametrize("zeros", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["cumprod", "prod"])
def test_where_factors_are_zero(name: str, zeros: int) -> None:
    """The derivative by a factor is the product of the others."""
    x = torch.randint(1, 4, (2, 3, 5)).double()
    x[..., 1 : 1 + zeros] = 0
    y, fast, v = (
        torch.randn(2, 3, 5).double(),
        {"scale": torch.randn(2, 5).double()},
        {"scale": torch.ones(2, 5).double()},
    )
    ours, plain = (FusedMAML(Whole(name).double(), 0.1, loss="mse", backend=b) for b in ("fused", "reference"))
    for method, more in (("loss_and_grad", ()), ("hvp", (v,))):
        got, wanted = (getattr(maml, method)(fast, x, y, *more) for maml in (ours, plain))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_long_sums_in_float32() -> None:
    """No farther from float64 than torch's own."""
    model = nn.Sequential(nn.Linear(3, 3000), Applied(lambda x: x.cumsum(1)))
    x = torch.randn(1, 2, 3)
    ours = FusedMAML(model, 0.1, loss="mse", backend="fused")
    fast = {n: p.detach().unsqueeze(0) for n, p in model.named_parameters()}
    got, torchs = ours.predict(fast, x)[0], model(x[0]).detach()
    exact = model.double()(x[0].double()).detach()
    assert (got - exact).norm() <= 2 * (torchs - exact).norm() + 2e-6 * exact.norm()

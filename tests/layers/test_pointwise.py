"""Every pointwise function, its first and its second derivative, over the range where it bends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_cuda import FusedMAML

# CELU at alpha = 1/2: torch 2.13's own double backward is wrong in the 8th digit where 1/alpha is not a float32.
FUNCTIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(0.01), nn.ELU(), nn.ELU(0.7), nn.SELU(), nn.CELU(0.5),
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(), nn.Softplus(2.0, 3.0), nn.Tanh(), nn.Sigmoid(),
    nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 17])
def test_passes(check_passes, function, n):
    check_passes(nn.Sequential(nn.Linear(2, 9), function, nn.Linear(9, 9), function), (2,), n)
    check_passes(nn.Sequential(nn.Conv2d(2, 3, 2), function, nn.Conv2d(3, 2, 1)), (2, 4, 3), n)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_far_and_at_the_kink(function):
    """Values far out, and exactly at a kink, are torch's."""

    class At(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Linear(1, 1).double()
            self.f = function

        def forward(self, x):
            return self.f(self.shift(x))

    model = At()
    x = torch.tensor([-800.0, -90.0, -20.5, -1.0, 0.0, 1e-9, 1.0, 6.0, 19.0, 21.0, 90.0, 800.0]).double()[None, :, None]
    fast = {"shift.weight": torch.ones(1, 1, 1).double(), "shift.bias": torch.zeros(1, 1).double()}
    y = torch.zeros_like(x)
    fused = FusedMAML(model, 0.1, loss="mse", backend="fused")
    oracle = FusedMAML(model, 0.1, loss="mse", backend="reference")
    torch.testing.assert_close(fused.predict(fast, x), oracle.predict(fast, x), rtol=1e-13, atol=1e-60)
    for name, grad in oracle.loss_and_grad(fast, x, y)[1].items():
        torch.testing.assert_close(fused.loss_and_grad(fast, x, y)[1][name], grad, rtol=1e-12, atol=1e-12)
    v = {"shift.bias": torch.ones(1, 1).double()}
    for name, product in oracle.hvp(fast, x, y, v).items():
        torch.testing.assert_close(fused.hvp(fast, x, y, v)[name], product, rtol=1e-12, atol=1e-12)


def test_functional_twin():
    assert F.relu(torch.tensor(-1.0)) == 0  # the names above are torch's own

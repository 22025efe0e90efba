"""pointwise: every function with its first and second derivative, near its kinks and far out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML


class Sin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


# CELU at alpha = 1/2: torch 2.13's own double backward is wrong in the 8th digit where 1/alpha is not a float32.
FUNCTIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(0.01), nn.ELU(), nn.ELU(0.7), nn.SELU(), nn.CELU(0.5),
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(), nn.Softplus(2.0, 3.0), nn.Tanh(), nn.Sigmoid(),
    nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0), Sin(),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 17])
def test_passes(check_passes, function, n):
    check_passes(nn.Sequential(nn.Linear(2, 9), function, nn.Linear(9, 9), function), (2,), n)
    check_passes(nn.Sequential(nn.Conv2d(2, 3, 2), function, nn.Conv2d(3, 2, 1)), (2, 4, 3), n)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_far_and_at_the_kink(machine, function):
    """Large arguments and exact kinks give torch's values and both derivatives. Each argument is one task."""
    model = nn.Sequential(nn.Linear(1, 1), function).double()
    kinks = [-1.0, -0.5, 0.0, -0.0, 1.0, 1.5, 2.0, 6.0, 20.0]
    x = torch.tensor([-800.0, -90.0, -20.5, *kinks, 1e-9, 19.0, 21.0, 90.0, 800.0]).double()[:, None, None]
    fast = {"0.weight": torch.ones(len(x), 1, 1).double(), "0.bias": torch.zeros(len(x), 1).double()}
    v = {"0.bias": torch.ones(len(x), 1).double()}
    y = torch.full_like(x, -3.0)  # out of every function's range, so that the second derivative counts
    fused = FusedMAML(model, 0.1, loss="mse", backend="fused")
    grads, products = fused.loss_and_grad(fast, x, y)[1], fused.hvp(fast, x, y, v)
    prediction = fused.predict(fast, x)
    for task, value in enumerate(x.flatten()):
        weight, bias = torch.tensor([1.0, 0.0]).double().requires_grad_().unbind()
        f = function(weight * value + bias)
        first = torch.autograd.grad((f + 3) ** 2, (weight, bias), create_graph=True)
        second = torch.autograd.grad(first[1], (weight, bias), materialize_grads=True)
        torch.testing.assert_close(prediction[task].flatten()[0], f.detach(), rtol=1e-13, atol=1e-60)
        for name, gradient, product in zip(fast, first, second, strict=True):
            torch.testing.assert_close(grads[name][task].flatten()[0], gradient.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(products[name][task].flatten()[0], product, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("function", [Sin(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.ELU()], ids=str)
def test_accuracy_in_float32(function):
    """Within 4 units in the last place of the value, at floats of every size up to 80 and angles beyond 2^20."""
    model = nn.Sequential(nn.Linear(1, 1), function)
    fused = FusedMAML(model, 0.1, loss="mse", backend="fused")
    x = torch.logspace(-30, 1.9, 5001)
    x = torch.cat([x, -x, torch.tensor([0.0, 3e6, -1.7e9])])
    fast = {"0.weight": torch.ones(1, 1, 1), "0.bias": torch.zeros(1, 1)}
    y = fused.predict(fast, x[None, :, None]).flatten()
    exact = function(x.double())
    unit = torch.exp2(exact.abs().clamp(min=2**-126).log2().floor() - 23)
    assert ((y - exact).abs() / unit).max() <= 4
    among_others = fused.predict(fast, x[None, 3:9, None]).flatten()
    assert torch.equal(among_others, y[3:9])  # the same bits without the large angles


def test_functional_twin():
    assert F.relu(torch.tensor(-1.0)) == 0  # the names above are torch's own

"""Weight and batch normalisation, where the derivatives of torch's own kernels are wrong, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import assert_close, episode, run


class Written(nn.Module):
    """Two linear layers whose weights are v g / |v|, with the rows' norms |v|."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (5, 3), (2, 5)
        self.v = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in sizes)
        self.g = nn.ParameterList(nn.Parameter(torch.rand(rows, 1)) for rows, _ in sizes)
        self.b = nn.ParameterList(nn.Parameter(torch.randn(rows)) for rows, _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (v * g / (v * v).sum(1, keepdim=True).sqrt() for v, g in zip(self.v, self.g, strict=True))
        return F.linear(torch.tanh(F.linear(x, first, self.b[0])), second, self.b[1])


def of_torch(written: Written) -> tuple[nn.Module, dict[str, str]]:
    """The same net by torch's parametrization, and its name for each parameter of `written`."""
    model = nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 2))).double()
    names = {}
    for i in range(2):
        weight = f"{2 * i}.parametrizations.weight.original"
        names |= {f"g.{i}": f"{weight}0", f"v.{i}": f"{weight}1", f"b.{i}": f"{2 * i}.bias"}
    model.load_state_dict({names[name]: p for name, p in written.state_dict().items()})
    return model, names


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
def test_its_meta_gradient_is_that_of_the_formula(backend: str) -> None:
    written, data = Written().double(), episode((3,), target=(2,))
    value, expected = oracle.meta_gradient(written, "mse", *data, 0.1, 2)
    model, names = of_torch(written)
    loss, grads = run(FusedMAML(model, 0.1, 2, loss="mse", backend=backend), data)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    assert_close({name: grads[names[name]] for name in expected}, expected)


def test_the_oracle_has_it_too() -> None:
    written, data = Written().double(), episode((3,), target=(2,))
    _, expected = oracle.meta_gradient(written, "mse", *data, 0.1, 2)
    model, names = of_torch(written)
    _, grads = oracle.meta_gradient(model, "mse", *data, 0.1, 2)
    assert_close({name: grads[names[name]] for name in expected}, expected)


class Turned(nn.Module):
    """Normalises [n, 3, 1, 4] turned to [n, 4, 1, 3]; gradcheck of torch's own batch_norm fails on this view."""

    def __init__(self, in_order: bool) -> None:
        super().__init__()
        self.in_order = in_order
        self.scale, self.norm = nn.Parameter(torch.rand(4)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        turned = (x * self.scale).permute(0, 3, 2, 1)
        return self.norm(turned.contiguous() if self.in_order else turned)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_of_a_view_on_which_torch_is_wrong(backend: str) -> None:
    model, data = Turned(in_order=False).double(), episode((3, 1, 4), target=(4, 1, 3))
    twin = Turned(in_order=True).double()
    twin.load_state_dict(model.state_dict())
    value, expected = oracle.meta_gradient(twin, "mse", *data, 0.1, 2)
    loss, grads = run(FusedMAML(model, 0.1, 2, loss="mse", backend=backend), data)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    assert_close(grads, expected)


def hard_sigmoid(x: Tensor) -> Tensor:
    return torch.where(x <= -3, torch.zeros_like(x), torch.where(x >= 3, torch.ones_like(x), x / 6 + 0.5))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_hardsigmoid_has_a_second_derivative(backend: str) -> None:
    class Gated(nn.Linear):
        def __init__(self, gate: Any) -> None:
            super().__init__(3, 2)
            self.gate = gate

        def forward(self, x: Tensor) -> Tensor:
            h = 4 * super().forward(x)
            return h * self.gate(h)

    model, data = Gated(nn.Hardsigmoid()).double(), episode((3,), target=(2,))
    twin = Gated(hard_sigmoid).double()
    twin.load_state_dict(model.state_dict())
    value, expected = oracle.meta_gradient(twin, "mse", *data, 0.01, 2)
    loss, grads = run(FusedMAML(model, 0.01, 2, loss="mse", backend=backend), data)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    assert_close(grads, expected)


@pytest.mark.parametrize("function", [F.softshrink, F.hardshrink, F.hardsigmoid, lambda x: F.threshold(x, 0.5, 1.0)])
def test_at_a_kink(function: Any) -> None:
    """Where torch takes a derivative of one side, so do layers."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(9))

        def forward(self, x: Tensor) -> Tensor:
            return function(x * self.scale)

    x = torch.tensor([-4, -3, -1, -0.5, 0, 0.5, 1, 3, 4]).double().expand(1, 2, 9)
    fast, y = {"scale": torch.ones(1, 9).double()}, torch.full((1, 2, 9), 0.3).double()
    ours, plain = (FusedMAML(Scaled().double(), 0.1, loss="mse", backend=b) for b in ("fused", "reference"))
    for method, more in (("loss_and_grad", ()), ("hvp", ({"scale": torch.randn(1, 9).double()},))):
        got, wanted = (getattr(maml, method)(fast, x, y, *more) for maml in (ours, plain))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

"""The general path treats the user's tensors as the fused path does: hooks, dtypes, a tensor passed twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import conftest

BACKENDS = ["fused", "reference"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def episode(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return conftest.episode(n=(5, 5), dtype=dtype)


def hooked(tensors, factor: float) -> list[Tensor]:
    """Registers hooks that multiply the gradient, and returns the list of what they are called with."""
    calls: list[Tensor] = []

    def hook(g: Tensor) -> Tensor:
        calls.append(g)
        return factor * g

    for t in tensors:
        t.register_hook(hook)
    return calls


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_of_parameters_and_rates_see_the_meta_gradient_once(backend, first_order):
    data, gradients = episode(), []
    for factor in (1, 2):
        model = net()
        rates = {name: nn.Parameter(torch.full(p.shape, 0.2).double()) for name, p in model.named_parameters()}
        maml = FusedMAML(model, rates, 2, first_order=first_order, backend=backend)
        calls = hooked(maml.parameters(), factor)
        maml(*data).loss.backward()
        assert len(calls) == len(list(maml.parameters())) == 8
        gradients.append([p.grad for p in maml.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_see_the_gradient_of_adapted_parameters_once(backend):
    data, gradients = episode(), []
    for factor in (1, 2):
        model = net()
        maml = FusedMAML(model, 0.2, 2, backend=backend)
        calls = hooked(model.parameters(), factor)
        fast = maml.adapt(*data[:2], differentiable=True)
        sum((p**2).sum() for p in fast.values()).backward()
        assert len(calls) == 4
        gradients.append([p.grad for p in model.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-14)


class Weighted(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * self.w, target)


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")
def test_hooks_of_a_loss_module_fire_once():
    data, gradients = episode(), []
    for factor in (1, 2):
        loss = Weighted()
        calls = hooked([loss.w], factor)
        FusedMAML(net(), 0.2, 2, loss=loss)(*data).loss.backward()
        assert len(calls) == 1
        gradients.append(loss.w.grad)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_loss_that_holds_the_model_itself(steps):
    """A penalty on theta in the outer loss: its gradient is added, and it has no effect on the inner loop."""
    data = episode()
    gradients = []
    for penalty in (0, 0.3):
        model = net()
        maml = FusedMAML(
            model, 0.2, steps,
            loss=lambda p, t, m=model, k=penalty: F.cross_entropy(p, t) + k * sum((w**2).sum() for w in m.parameters()),
        )  # fmt: skip
        maml(*data).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, penalised, p in zip(*gradients, model.parameters(), strict=True):
        torch.testing.assert_close(penalised, plain + 0.6 * p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("form", ["[]", "[steps]", "elementwise", "[steps, *shape]"])
def test_rates_of_another_dtype_count_in_the_models(form, dtype):
    data, results = episode(torch.float32), []
    for backend in BACKENDS:
        model = net().float()
        shapes = {name: p.shape for name, p in model.named_parameters()}
        form_of = {"[]": lambda s: (), "[steps]": lambda s: (2,), "elementwise": lambda s: s}
        shape = form_of.get(form, lambda s: (2, *s))
        rates = {name: nn.Parameter(torch.full(shape(s), 0.25, dtype=dtype)) for name, s in shapes.items()}
        maml = FusedMAML(model, rates, 2, backend=backend)
        maml(*data).loss.backward()
        assert {p.grad.dtype for p in rates.values()} == {dtype}
        fast = maml.adapt(*data[:2])
        assert {p.dtype for p in fast.values()} == {torch.float32}
        results.append([p.grad.float() for p in maml.parameters()] + list(fast.values()))
    for fused, plain in zip(*results, strict=True):
        # The gradient of a rate in half precision is rounded once.
        torch.testing.assert_close(fused, plain, rtol=2**-10 if dtype == torch.float16 else 1e-5, atol=1e-6)


def test_one_tensor_as_support_and_query():
    x, y, _, _ = episode()
    maml = FusedMAML(net(), 0.2, 2, backend="reference")
    gradients = []
    for twin in (lambda t: t, torch.clone):
        leaf = x.clone().requires_grad_()
        maml(leaf, y, twin(leaf), y).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def test_a_model_is_called_as_often_as_in_a_plain_loop():
    """3 tasks and 2 inner steps."""
    x_spt, y_spt, x_qry, y_qry = episode()
    model = Counted()
    maml = FusedMAML(model, 0.2, 2, backend="reference")
    fast = conftest.fast_parameters(model, 3, torch.Generator())
    counts = []
    for call in (
        lambda: maml(x_spt, y_spt, x_qry, y_qry),
        lambda: maml.adapt(x_spt, y_spt),
        lambda: maml.predict(fast, x_qry),
        lambda: maml.loss_and_grad(fast, x_spt, y_spt),
        lambda: maml.hvp(fast, x_spt, y_spt, fast),
    ):
        model.calls = 0
        call()
        counts.append(model.calls)
    assert counts == [9, 6, 3, 3, 3]

"""Every entry point of the general path against the float64 oracle in tests/oracle.py."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import assert_close, run

RATE, STEPS = 0.3, 2


def episode(*sample: int, loss: str = "mse", out: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tasks of 3 support and 4 query samples."""
    x = [torch.randn(2, n, *sample).double() for n in (3, 4)]
    y = [torch.randn(2, n, out).double() if loss == "mse" else torch.randint(out, (2, n)) for n in (3, 4)]
    return x[0], y[0], x[1], y[1]


def held(model: nn.Module) -> list[tuple[int, str, int]]:
    """The identity of every parameter and buffer, by the dictionary that holds it."""
    registries = [r for m in model.modules() for r in (m._parameters, m._buffers)]
    return [(id(r), key, id(t)) for r in registries for key, t in r.items()]


def maml_of(model: nn.Module, loss: str = "mse", **options: object) -> FusedMAML:
    return FusedMAML(model, RATE, STEPS, loss=loss, backend="reference", **options)


def check_entries(
    model: nn.Module, data: tuple[Tensor, ...], loss: str = "mse", plain: nn.Module | None = None
) -> None:
    """Compares every entry point with the oracle: a call at first order, all of them at second order.

    plain: the oracle's model, if it differs from `model`.
    """
    x_spt, y_spt, x_qry, y_qry = data
    plain = plain or copy.deepcopy(model)
    function = oracle.LOSSES.get(loss, loss)
    maml = maml_of(model, loss)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    before = held(model)
    for first_order in (True, False):
        maml.first_order = first_order
        value, expected = oracle.meta_gradient(plain, loss, *data, RATE, STEPS, first_order)
        got, grads = run(maml, data)
        torch.testing.assert_close(got, value, rtol=1e-11, atol=0)
        assert_close(grads, expected)

    maml.zero_grad()
    maml.backward(*data)
    assert_close(gradients(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(maml(*data).loss, value, rtol=1e-11, atol=0)
        assert not maml.predict(maml.adapt(x_spt, y_spt), x_qry).requires_grad

    adapted, expected_adapted = maml.adapt(x_spt, y_spt), oracle.adapt(plain, loss, x_spt, y_spt, RATE, STEPS)
    assert_close({n: adapted[n] for n in names}, expected_adapted)
    maml.zero_grad()
    fast = maml.adapt(x_spt, y_spt, differentiable=True)
    predictions = maml.predict(fast, x_qry)
    with torch.no_grad():
        torch.testing.assert_close(maml.predict(fast, x_qry), predictions, rtol=1e-11, atol=1e-13)
    sum(function(p, y) for p, y in zip(predictions, y_qry, strict=True)).div(len(y_qry)).backward()
    assert_close(gradients(model), expected)

    fast, v = ({n: of_each(p) for n, p in model.named_parameters()} for _ in range(2))
    leaves = {n: p.clone().requires_grad_(n in names) for n, p in fast.items()}
    moved = {n: leaves[n] for n in names}
    losses = [function(p, y) for p, y in zip(oracle.predict(plain, leaves, x_qry), y_qry, strict=True)]
    first, second = derivatives(sum(losses), moved, v)
    values, gradient = maml.loss_and_grad(fast, x_qry, y_qry)
    torch.testing.assert_close(values, torch.stack(losses).detach(), rtol=1e-11, atol=0)
    assert_close(gradient, first)
    assert_close(maml.hvp(fast, x_qry, y_qry, v), second)
    predictions = maml.predict(leaves, x_qry)
    objective = sum(function(p, y) for p, y in zip(predictions, y_qry, strict=True))
    for got, expected in zip(derivatives(objective, moved, v), (first, second), strict=True):
        assert_close(got, expected)
    assert held(model) == before
    assert not any(x.requires_grad for x in (x_spt, x_qry))


def of_each(p: Tensor) -> Tensor:
    """Different parameters for each of two tasks; frozen parameters are only expanded."""
    twice = p.detach().expand(2, *p.shape)
    return twice + 0.1 * torch.randn_like(twice) if p.requires_grad else twice


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def derivatives(value: Tensor, at: dict[str, Tensor], v: dict[str, Tensor]) -> tuple[dict, dict]:
    """The gradient, and the Hessian-vector product with v."""
    grads = torch.autograd.grad(value, at.values(), create_graph=True)
    along = sum((g.conj() * v[n]).real.sum() for n, g in zip(at, grads, strict=True))
    products = torch.autograd.grad(along, at.values())
    return dict(zip(at, map(Tensor.detach, grads), strict=True)), dict(zip(at, products, strict=True))

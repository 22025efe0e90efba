"""tests/oracle.py against the package's reference, and against a function differentiated by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maml_cuda import reference
from tests import oracle
from tests.conftest import assert_close


def test_by_hand():
    """y = w x, one step: w' = w - 2 a (w s - c), so the gradient is that of the query loss times 1 - 2 a s."""
    model = nn.Linear(1, 1, bias=False)
    x, y, xq, yq = torch.randn(4, 1, 5, 1)
    w, s, c = model.weight.item(), (x.double() ** 2).mean(), (x.double() * y.double()).mean()
    phi = w - 2 * 0.1 * (w * s - c)
    error = phi * xq.double() - yq.double()
    loss, grads = oracle.meta_gradient(model, "mse", x, y, xq, yq, 0.1, 1)
    assert loss.item() == pytest.approx((error**2).mean().item(), rel=1e-13)
    expected = (2 * error * xq.double()).mean() * (1 - 2 * 0.1 * s)
    assert grads["weight"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert oracle.adapt(model, "mse", x, y, 0.1, 1)["weight"].item() == pytest.approx(phi.item(), rel=1e-13)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapted", [None, ["2.weight", "2.bias"]])
def test_it_agrees_with_the_reference(adapted, first_order):
    """Two implementations that share no code."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    x, xq = torch.randn(2, 3, 6, 3).double()
    y, yq = torch.randint(4, (2, 3, 6))
    given = "cross_entropy", x, y, xq, yq, 0.3, 2, first_order, adapted
    (loss, grads), (value, expected) = oracle.meta_gradient(model, *given), reference.meta_gradient(model, *given)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    assert_close(grads, expected, 1e-12)
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert int(model[1].num_batches_tracked) == 0

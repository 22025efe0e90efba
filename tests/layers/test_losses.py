"""The two losses: value, gradient and tangent."""

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML


@pytest.mark.parametrize("classes", [1, 2, 5, 20, 33])
@pytest.mark.parametrize("n", [1, 7])
def test_cross_entropy(classes, n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, classes)).double()
    x, y = torch.randn(2, n, 3).double(), torch.randint(0, classes, (2, n))
    fast = {name: torch.randn(2, *p.shape).double() * 3 for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in fast.items()}
    fused = FusedMAML(model, 0.1, backend="fused")
    oracle = FusedMAML(model, 0.1, backend="reference")
    torch.testing.assert_close(
        fused.loss_and_grad(fast, x, y), oracle.loss_and_grad(fast, x, y), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(fused.hvp(fast, x, y, v), oracle.hvp(fast, x, y, v), rtol=1e-11, atol=1e-13)


def test_cross_entropy_of_large_logits_is_finite():
    model = nn.Linear(1, 2).double()
    fast = {"weight": torch.tensor([[[1000.0], [-1000.0]]]).double(), "bias": torch.zeros(1, 2).double()}
    x, y = torch.ones(1, 2, 1).double(), torch.tensor([[0, 1]])
    losses, grads = FusedMAML(model, 0.1, backend="fused").loss_and_grad(fast, x, y)
    assert losses.item() == 1000.0
    assert all(torch.isfinite(g).all() for g in grads.values())

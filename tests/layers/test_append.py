"""append: a Gaussian policy's log_std behind its mean, and the floor that a clamp gives it."""

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, PolicyTarget
from tests.conftest import assert_close, fast_parameters


class Policy(nn.Module):
    def __init__(self, action: int, floor: float | None) -> None:
        super().__init__()
        self.mean, self.log_std, self.floor = nn.Linear(3, action), nn.Parameter(0.3 * torch.randn(action)), floor

    def forward(self, x):
        return self.mean(x), self.log_std if self.floor is None else self.log_std.clamp(min=self.floor)


@pytest.mark.parametrize("floor", [None, 0.0])
@pytest.mark.parametrize(("n", "action"), [(1, 1), (5, 3), (33, 17)])
def test_passes(machine, n, action, floor):
    """The prediction, the gradient and the Hessian-vector product against autograd, at each task's own parameters."""
    generator = torch.Generator().manual_seed(0)
    model = Policy(action, floor).double()
    fused, reference = (
        FusedMAML(model, 0.1, 1, loss="gaussian_policy_gradient", backend=backend) for backend in ("fused", "reference")
    )
    fast, v = fast_parameters(model, 2, generator), fast_parameters(model, 2, generator)
    x = torch.randn(2, n, 3, dtype=torch.float64)
    y = PolicyTarget(torch.randn(2, n, action, dtype=torch.float64), torch.randn(2, n, dtype=torch.float64))
    for got, expected in zip(fused.predict(fast, x), reference.predict(fast, x), strict=True):
        torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-12, atol=1e-14)
    losses, gradients = fused.loss_and_grad(fast, x, y)
    expected_losses, expected = reference.loss_and_grad(fast, x, y)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-14)
    assert_close(gradients, expected, 1e-11)
    assert_close(fused.hvp(fast, x, y, v), reference.hvp(fast, x, y, v), 1e-10)

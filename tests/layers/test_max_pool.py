"""max_pool: every window, overlaps and padding; the first of equal values wins."""

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML
from tests.layers.windows import WINDOWS


@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), WINDOWS)
@pytest.mark.parametrize("n", [1, 5])
def test_windows(check_passes, kernel, stride, padding, height, width, n):
    pool = nn.MaxPool2d(kernel, stride, padding)
    check_passes(nn.Sequential(nn.Conv2d(2, 5, 1), nn.Tanh(), pool, nn.Conv2d(5, 2, 1)), (2, height, width), n)


def test_ties_take_the_first_as_torch_does():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.zeros(1, 3, 1, 4, 4).double()
    x[:, :, :, 0::2, 1::2] = 1.0  # ties between equal ones and between zeros
    x[:, :, :, 1::2, 0::2] = 1.0
    fast = {n: p.detach()[None].clone() for n, p in model.named_parameters()}
    fast["0.weight"].fill_(1.0)
    fast["0.bias"].fill_(0.0)
    y = torch.randn(1, 3, 3).double()
    grads = [FusedMAML(model, 0.1, loss="mse", backend=b).loss_and_grad(fast, x, y)[1] for b in ("fused", "reference")]
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-13, atol=1e-15)

"""Max, average and mean pools; ties, padding and overlapping windows."""

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML

WINDOWS = [  # kernel, stride, padding, height, width
    (2, None, 0, 4, 4),
    (2, None, 0, 5, 7),
    (3, 2, 1, 5, 6),
    (3, 1, 1, 4, 3),
    ((2, 3), (1, 2), (1, 0), 4, 5),
    (1, 2, 0, 3, 3),
    (4, 3, 2, 6, 5),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), WINDOWS)
@pytest.mark.parametrize("n", [1, 5])
def test_windows(check_passes, kernel, stride, padding, height, width, n):
    for pool in (
        nn.MaxPool2d(kernel, stride, padding),
        nn.AvgPool2d(kernel, stride, padding),
        nn.AvgPool2d(kernel, stride, padding, count_include_pad=False),
    ):
        check_passes(nn.Sequential(nn.Conv2d(2, 5, 1), nn.Tanh(), pool, nn.Conv2d(5, 2, 1)), (2, height, width), n)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (4, 5)])
def test_mean(check_passes, height, width):
    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 17, 1)
            self.head = nn.Linear(17, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.conv(x)).mean([2, 3]))

    check_passes(Spatial(), (3, height, width), 3)
    model = nn.Sequential(nn.Conv2d(3, 17, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 4))
    check_passes(model, (3, height, width), 3)


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

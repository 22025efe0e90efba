"""add: residual sums, values that several layers read, and a weight in two layers."""

import pytest
import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = nn.Conv2d(2, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.c = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        y = torch.tanh(self.b(x) + x)
        return self.c(y) + y + (x + x)


class Shared(nn.Module):
    """A weight in two layers, and a value that three layers read."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        g = self.again(torch.tanh(self.again(h)))
        return self.head(g + h) + self.head(h)


@pytest.mark.parametrize("channels", [1, 5, 16])
def test_residual(check_passes, channels):
    check_passes(Residual(channels), (2, 4, 3), 3)


def test_shared_weight(check_passes):
    check_passes(Shared(), (4,), 5)

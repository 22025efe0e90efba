"""Layers that only place values: flatten in the user's order, residual sums, values read more than once."""

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
    """One weight in two layers, and a value that three layers read."""

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


def test_flatten_keeps_the_users_order(check_passes):
    check_passes(nn.Sequential(nn.Conv2d(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 3 * 2, 4)), (2, 4, 3), 3)


def test_image_prediction_in_the_users_order(check_passes):
    check_passes(nn.Sequential(nn.Conv2d(2, 5, 2), nn.Tanh()), (2, 4, 3), 3)


def test_flatten_of_the_input(check_passes):
    check_passes(nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (2, 4, 3), 3)
    check_passes(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (4, 3), 3)


def test_input_read_as_image_and_as_features(check_passes):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)
            self.flat = nn.Linear(24, 3)

        def forward(self, x):
            return self.conv(x).mean([2, 3]) + self.flat(x.flatten(1)) + self.flat(torch.relu(x).view(x.size(0), -1))

    check_passes(Both(), (2, 4, 3), 3)

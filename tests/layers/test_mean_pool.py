"""mean_pool: the mean over all pixels."""

import pytest
import torch
from torch import nn


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

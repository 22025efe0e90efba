"""Rung 3 where BatchNorm's input lies far from zero, as raw images do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.engine.test_meta_gradient import as_good_as_the_reference

FAR_FROM_ZERO = {
    "behind a convolution": lambda: [nn.Conv2d(3, 16, 5), nn.BatchNorm2d(16), nn.Tanh()],
    "of the input": lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 16, 5), nn.Tanh()],
    "of a linear layer": lambda: [nn.Flatten(), nn.Linear(432, 16), nn.BatchNorm1d(16), nn.Tanh()],
}


@pytest.mark.parametrize("ratio", [30, 100])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("where", FAR_FROM_ZERO)
def test_batch_norm_of_a_mean_of_many_deviations(machine, where, steps, ratio):
    """A mean that is rounded to float32 would shift every row by the same, and grad_x with it."""
    layers = FAR_FROM_ZERO[where]()
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    data = [torch.randn(2, 6, 3, 12, 12) + ratio if x else torch.randint(3, (2, 6)) for x in (1, 0, 1, 0)]
    with torch.no_grad():
        model(data[0][0])
    as_good_as_the_reference(model, data, steps)

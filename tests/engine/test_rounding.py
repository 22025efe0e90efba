"""Float32 error where the mean of BatchNorm's input is many standard deviations, as for raw images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import as_good_as_the_reference

FAR_FROM_ZERO = {
    "behind a convolution": lambda: [nn.Conv2d(3, 16, 5), nn.BatchNorm2d(16), nn.Tanh()],
    "of the input": lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 16, 5), nn.Tanh()],
    "of a linear layer": lambda: [nn.Flatten(), nn.Linear(432, 16), nn.BatchNorm1d(16), nn.Tanh()],
}


@pytest.mark.parametrize("ratio", [30, 100])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("where", FAR_FROM_ZERO)
def test_batch_norm_of_a_mean_of_many_deviations(machine, where, steps, ratio):
    """A mean rounded to float32 would shift all rows by the same amount, and grad_x with them."""
    layers = FAR_FROM_ZERO[where]()
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    data = [torch.randn(2, 6, 3, 12, 12) + ratio if x else torch.randint(3, (2, 6)) for x in (1, 0, 1, 0)]
    with torch.no_grad():
        model(data[0][0])
    as_good_as_the_reference(model, data, steps)

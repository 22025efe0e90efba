"""Linear, at sizes around the register blocks."""

import pytest
from torch import nn


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 8, 9, 257])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_samples(check_passes, n, width):
    check_passes(nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)), (3,), n)


@pytest.mark.parametrize("out", [1, 2, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_widths(check_passes, out, bias):
    check_passes(nn.Sequential(nn.Linear(5, out, bias=bias), nn.Linear(out, 3, bias=bias)), (5,), 7, tasks=1)


@pytest.mark.parametrize("features", [1, 2, 4])
@pytest.mark.parametrize("out", [1, 3, 16, 21, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_few_inputs(check_passes, features, out, bias):
    """Sums of so few products, a tangent's two terms among them, that their weights stay in registers."""
    layers = nn.Linear(features, out, bias=bias), nn.Linear(out, features, bias=bias), nn.Linear(features, 2)
    check_passes(nn.Sequential(*layers), (features,), 11)

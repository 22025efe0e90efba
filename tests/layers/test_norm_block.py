"""norm_block (CUDA): BatchNorm, an activation and a max-pool behind a convolution, in one layer."""

import pytest
from torch import nn


@pytest.mark.parametrize(
    "function", [nn.Identity(), nn.Tanh(), nn.SiLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.2)], ids=str
)
@pytest.mark.parametrize(
    "pool", [nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 2), 1)], ids=str
)
def test_functions_and_pools(check_passes, function, pool):
    """On an input with a tangent: the convolution before it is adapted."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5, eps=0.1), function,
        pool, nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    check_passes(model, (2, 7, 6), 3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 8, 17])
def test_channels(check_passes, channels, affine):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, eps=0.1, affine=affine),
        nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(channels, 2, 1),
    )  # fmt: skip
    check_passes(model, (2, 8, 7), 4)

"""BatchNorm with batch statistics, on features and on images."""

import pytest
from torch import nn


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 8, 17, 33])
@pytest.mark.parametrize("n", [2, 3, 300])
def test_features(check_passes, affine, channels, n):
    # Two samples are always normalised to -1 and 1, so that with a tiny eps the gradient of the layer before would be
    # rounding noise; eps=0.1 keeps it well conditioned.
    norm = nn.BatchNorm1d(channels, eps=0.1, affine=affine)
    model = nn.Sequential(nn.Linear(3, channels), norm, nn.Tanh(), nn.Linear(channels, 2))
    check_passes(model, (3,), n, tasks=1)


@pytest.mark.filterwarnings("ignore:predict is given one query sample:UserWarning")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1, 3), (2, 5), (9, 8)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_images(check_passes, affine, n, size, eps):
    model = nn.Sequential(
        nn.BatchNorm2d(2, affine=affine), nn.Conv2d(2, 9, 3, 1, 1), nn.BatchNorm2d(9, eps=eps, affine=affine),
        nn.Tanh(), nn.Conv2d(9, 3, 3),
    )  # fmt: skip
    check_passes(model, (2, size, size), n)

"""avg_pool: every window, overlaps, and padding that counts or does not."""

import pytest
from torch import nn

from tests.layers.windows import WINDOWS


@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), WINDOWS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_windows(check_passes, kernel, stride, padding, height, width, n, count_include_pad):
    pool = nn.AvgPool2d(kernel, stride, padding, count_include_pad=count_include_pad)
    check_passes(nn.Sequential(nn.Conv2d(2, 5, 1), nn.Tanh(), pool, nn.Conv2d(5, 2, 1)), (2, height, width), n)

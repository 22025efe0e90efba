"""patch_gram: second moments of the input's patches, by which a stem has its statistics: kernels, strides, paddings."""

from __future__ import annotations

import pytest
from torch import nn

SHAPES = [  # channels, height, width, filters, kernel, stride, padding
    (1, 6, 7, 5, 3, 2, 1),
    (3, 9, 8, 17, 3, 1, 1),
    (2, 7, 7, 64, (2, 3), (2, 1), (0, 2)),
    (1, 12, 11, 3, 5, 1, 0),
    (5, 4, 6, 33, 1, 1, 0),
    (2, 9, 11, 6, 3, 2, 1),  # by strides: rows and columns fall into classes
    (1, 13, 14, 5, (4, 3), (3, 2), (2, 0)),
    (3, 10, 11, 4, (2, 3), (3, 5), 0),  # what no tap sees lies between the taps
    (1, 5, 4, 6, (4, 3), 1, 0),  # fewer positions than taps
    (1, 3, 3, 6, 5, 2, 2),
]


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(("channels", "height", "width", "filters", "kernel", "stride", "padding"), SHAPES)
def test_shapes(check_passes, channels, height, width, filters, kernel, stride, padding, pool):
    layers = [nn.Conv2d(channels, filters, kernel, stride, padding), nn.BatchNorm2d(filters), nn.Tanh()]
    if pool:
        layers.append(nn.MaxPool2d(2))
    check_passes(nn.Sequential(*layers, nn.Conv2d(filters, 2, 1)), (channels, height, width), 3)

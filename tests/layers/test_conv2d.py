"""conv2d: kernels, strides and paddings, odd sizes, channel counts around the register blocks; Linear is the case of
one pixel."""

import pytest
import torch
from torch import nn

from tests.conftest import check_meta_gradient

GEOMETRY = [  # kernel, stride, padding, height, width
    (1, 1, 0, 5, 4),
    (3, 1, 1, 5, 7),
    (3, 2, 1, 6, 5),
    (3, 2, 1, 7, 8),
    (3, 2, 0, 8, 7),
    (2, 2, 0, 5, 5),
    (1, 2, 0, 5, 6),
    (5, 3, 2, 9, 7),
    (3, 1, 4, 3, 3),  # more padding than the kernel reaches
    ((2, 3), (3, 1), (1, 0), 6, 5),
    ((1, 4), (1, 2), (0, 3), 3, 5),
    (3, 4, 1, 6, 6),  # positions that no tap reaches
    (4, 1, "same", 5, 5),
    ((2, 3), 1, "same", 4, 4),
    (3, 1, "valid", 4, 4),
    (5, 1, 2, 2, 3),  # no output has all taps inside
    ((3, 1), (2, 1), (3, 0), 2, 3),  # outputs that no tap reaches
]


# torch's own convolution warns that "same" padding of an even kernel is slow.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), GEOMETRY)
@pytest.mark.parametrize("bias", [True, False])
def test_geometry(check_passes, kernel, stride, padding, height, width, bias):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, kernel, stride, padding, bias=bias))
    check_passes(model, (2, height, width), n=3)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100])
def test_channels(check_passes, channels):
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 5, 3, 2, 1))
    check_passes(model, (3, 5, 4), n=2, tasks=1)


@pytest.mark.parametrize("n", [1, 2, 23, 300])
def test_sample_groups(check_passes, n):
    """More samples than one padded group holds, and counts that the group size does not divide."""
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 3, 2, 1))
    check_passes(model, (2, 6, 7), n=n, tasks=1)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1, 3, 1), nn.Conv1d(3, 4, 1, 3, 1)])
def test_a_tap_on_padding_alone(machine, layer):
    """Kernel, input and output have one pixel, but the tap reads padding: not a linear layer."""
    axes = layer.weight.dim() - 2
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 6, 5, 3, *[1] * axes).double()
    check_meta_gradient(
        model, "cross_entropy", [x[0], torch.randint(2, (6, 5)), x[1], torch.randint(2, (6, 5))], 0.1, 2
    )


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
    """So few inputs that the weights stay in registers, also in a tangent, which sums two products per weight."""
    layers = nn.Linear(features, out, bias=bias), nn.Linear(out, features, bias=bias), nn.Linear(features, 2)
    check_passes(nn.Sequential(*layers), (features,), 11)

"""Convolutions and pools that the layers on images do not serve: dilation, groups, transposed convolutions, three
spatial axes, computed weights, ceil_mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maml_cuda import FusedMAML
from tests.conftest import as_good_as_the_reference, check_meta_gradient, episode

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = {1: (9,), 2: (7, 5), 3: (5, 4, 3)}


def between(layer: nn.Module, axes: int, channels: int = 4, out: int = 4) -> nn.Sequential:
    """A layer of this number of channels between two others, so that its input and output both have cotangents."""
    return nn.Sequential(CONV[axes - 1](3, channels, 1), nn.Tanh(), layer, nn.Tanh(), CONV[axes - 1](out, 2, 1))


def case(axes: int, **options: object) -> object:
    return pytest.param(axes, options, id=f"{axes}d {options}")


# torch's own convolution warns that "same" padding of an even kernel is slow.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("axes", "options"),
    [
        case(1, kernel_size=3, dilation=2),
        case(1, kernel_size=3, dilation=4, padding=8),
        case(1, kernel_size=3, padding="same", dilation=2),
        case(1, kernel_size=2, padding="same", dilation=3),
        case(1, kernel_size=3, groups=2, padding=1),
        case(1, kernel_size=3, groups=4, padding=1, bias=False),
        case(2, kernel_size=3, dilation=2, stride=2, padding=2),
        case(2, kernel_size=(3, 2), dilation=(1, 2), stride=(2, 1), padding=(1, 0)),
        case(2, kernel_size=1, groups=2),
        case(2, kernel_size=2, stride=2, groups=2),
        case(2, kernel_size=3, padding=1, groups=2),
        case(2, kernel_size=3, padding=1, groups=4),
        case(2, kernel_size=(9, 1), padding=(4, 0), groups=4),
        case(2, kernel_size=3, padding=2, stride=3, groups=4, dilation=2),
        case(3, kernel_size=1),
        case(3, kernel_size=3, padding=1),
        case(3, kernel_size=(3, 2, 1), stride=(2, 1, 1), padding=(1, 1, 0), groups=2),
        case(3, kernel_size=2, dilation=(2, 1, 2)),
    ],
)
def test_convolution(check_passes, axes, options, n):
    check_passes(between(CONV[axes - 1](4, 4, **options), axes), (3, *SIZES[axes]), n=n)


@pytest.mark.parametrize("channels", [8, 17, 70])
def test_depthwise(check_passes, channels):
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    check_passes(between(layer, 2, channels, channels), (3, 5, 6), n=3)


@pytest.mark.parametrize("out", [16, 24])
def test_several_outputs_of_a_channel(check_passes, out):
    check_passes(between(nn.Conv2d(8, out, 3, padding=1, groups=8), 2, 8, out), (3, 5, 6), n=2)


def test_sizes_that_are_equal(check_passes):
    """Samples, channels, pixels and taps are as many."""
    check_passes(between(nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3), 2, 3, 3), (3, 3, 3), n=3)


def test_as_the_first_layer(check_passes):
    """Of the plan's input, which has channels first in memory."""
    for layer in (nn.Conv2d(4, 6, 3, dilation=2), nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(4, 3, 2, 2)):
        features = layer(torch.rand(1, 4, 7, 6)).numel()
        check_passes(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 2)), (4, 7, 6), n=3)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("axes", "options"),
    [
        case(1, kernel_size=3, stride=2),
        case(1, kernel_size=1, stride=3),
        case(2, kernel_size=2, stride=2),
        case(2, kernel_size=3, stride=2, padding=1, output_padding=1),
        case(2, kernel_size=(4, 3), stride=(2, 1), padding=(1, 0), bias=False),
        case(2, kernel_size=3, stride=2, padding=2, dilation=2, groups=2),
        case(2, kernel_size=3, padding=2),
        case(3, kernel_size=2, stride=2),
    ],
)
def test_transposed(check_passes, axes, options, n):
    check_passes(between(TRANSPOSED[axes - 1](4, 6, **options), axes, out=6), (3, *SIZES[axes]), n=n)


# -- weights that are computed ------------------------------------------------------------------------------------


class ByNorm(nn.Module):
    """A weight that is divided by its norm. torch's own _weight_norm_interface has a wrong second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight / torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)


def test_weight_norm(check_passes):
    layer = nn.Conv1d(4, 4, 3, dilation=2, padding=2)
    parametrize.register_parametrization(layer, "weight", ByNorm())
    check_passes(between(layer, 1), (3, 9), n=2)


class OfAnother(nn.Module):
    """A convolution whose weight and bias a linear layer of a learned code makes: a hypernetwork."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.code = groups, nn.Parameter(torch.randn(5))
        self.weight, self.bias = nn.Linear(5, 4 * (4 // groups) * 9), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight(self.code).view(4, 4 // self.groups, 3, 3)
        return F.conv2d(x, weight, self.bias(self.code), padding=1, groups=self.groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_of_a_hypernetwork(check_passes, groups):
    check_passes(between(OfAnother(groups), 2), (3, 5, 4), n=3)


class OfEachSample(nn.Module):
    """A convolution with a mixture of weights for each sample, as a group each: CondConv."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(2, 6, 4, 3, 3) / 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        mixture = torch.sigmoid(self.gate(x.mean((2, 3))))
        weight = (mixture @ self.weight.flatten(1)).view(n * 6, c, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n).view(n, 6, h, w)


@pytest.mark.parametrize("n", [3, 4])
def test_with_a_weight_for_each_sample(check_passes, n):
    check_passes(between(OfEachSample(), 2, out=6), (3, 5, 4), n=n)


class Twice(nn.Module):
    """One weight in a layer on images and in a dilated convolution."""

    def __init__(self, dilated_first: bool) -> None:
        super().__init__()
        self.weight, self.dilations = nn.Parameter(torch.randn(3, 3, 3, 3) / 4), (2, 1) if dilated_first else (1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for d in self.dilations:
            x = torch.tanh(F.conv2d(x, self.weight, padding=d, dilation=d))
        return x


@pytest.mark.parametrize("dilated_first", [False, True])
def test_of_a_weight_that_two_read(check_passes, dilated_first):
    check_passes(Twice(dilated_first), (3, 5, 4), n=2)


class Blurred(nn.Module):
    """A fixed kernel that forward makes, on values that repeat: an upsampled image, and one that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.level = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype).outer(torch.tensor([1.0, 3.0, 1.0], dtype=x.dtype)) / 20
        kernel = kernel.expand(4, 1, 3, 3)
        h = F.interpolate(torch.tanh(self.first(x)), scale_factor=2)
        level = self.level.expand(1, 4, *h.shape[2:])
        return torch.sin(F.conv2d(h, kernel, padding=1, groups=4) + F.conv2d(level, kernel, padding=1, groups=4))


def test_of_values_that_repeat(check_passes):
    check_passes(Blurred(), (3, 3, 2), n=3)


class Autoencoder(nn.Module):
    """One weight in a convolution and in a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.conv2d(x, self.weight, stride=2, padding=1))
        return F.conv_transpose2d(h, self.weight, stride=2, padding=1, output_padding=(0, 1))


def test_of_a_weight_that_is_transposed(check_passes):
    check_passes(Autoencoder(), (3, 5, 4), n=2)


# -- pools --------------------------------------------------------------------------------------------------------

POOLS = {
    "dilated maximum 1d": (1, nn.MaxPool1d(3, 1, dilation=2)),
    "maximum 1d, padded and dilated": (1, nn.MaxPool1d(3, 2, 1, dilation=2)),
    "maximum 1d in ceil_mode": (1, nn.MaxPool1d(2, 2, ceil_mode=True)),
    "maximum 2d in ceil_mode": (2, nn.MaxPool2d(2, 2, ceil_mode=True)),
    "maximum 2d, padded in ceil_mode": (2, nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "maximum 2d, dilated and padded": (2, nn.MaxPool2d(2, 2, 1, dilation=(2, 1))),
    "maximum 3d": (3, nn.MaxPool3d(2, 1)),
    "maximum 3d, padded": (3, nn.MaxPool3d(3, 2, 1)),
    "mean 1d in ceil_mode": (1, nn.AvgPool1d(2, 2, ceil_mode=True)),
    "mean 2d in ceil_mode": (2, nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "mean 2d in ceil_mode, without padding": (2, nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "mean 2d by a divisor": (2, nn.AvgPool2d(2, 2, divisor_override=3)),
    "mean 3d": (3, nn.AvgPool3d(2, 1)),
    "mean 3d, padded": (3, nn.AvgPool3d(3, 2, 1)),
    "mean 3d, without padding": (3, nn.AvgPool3d(3, 2, 1, count_include_pad=False)),
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pool(check_passes, pool, n):
    axes, layer = pool
    check_passes(between(layer, axes), (3, *SIZES[axes]), n=n)


class Ties(nn.Module):
    """Values of which many are equal, as after a ReLU."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool, self.scale = pool, nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x - 0.5) * self.scale  # 0 for half of the pixels
        place = torch.arange(1.0, 43.0, dtype=x.dtype).view(6, 7)
        return self.pool(h * h + self.scale * place * 0.0 + self.scale).flatten(1) + (self.scale * place).sum()


def test_the_first_of_equal_maxima(check_passes):
    check_passes(Ties(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), (2, 6, 7), n=2)


class Unfolded(nn.Module):
    def __init__(self, unfold) -> None:
        super().__init__()
        self.first, self.unfold = nn.Conv2d(3, 4, 1), unfold

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.unfold(torch.tanh(self.first(x)))).flatten(1)


UNFOLDS = {
    "im2col": lambda x: F.unfold(x, 3, padding=1),
    "im2col, dilated": lambda x: F.unfold(x, (2, 3), dilation=(2, 1), stride=(1, 2)),
    "rows apart": lambda x: x.unfold(2, 2, 2),
    "columns": lambda x: x.unfold(-1, 3, 1),
    "rows and columns": lambda x: x.unfold(2, 3, 1).unfold(3, 3, 1),
    "channels": lambda x: x.unfold(1, 2, 1),
}


@pytest.mark.parametrize("unfold", UNFOLDS.values(), ids=UNFOLDS)
def test_unfold(check_passes, unfold):
    check_passes(Unfolded(unfold), (3, 7, 5), n=2)


# -- refusals -----------------------------------------------------------------------------------------------------


class OverSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.t().unsqueeze(0)).squeeze(0).t()


def test_windows_over_the_samples_are_refused():
    """Where support and query sets are of different sizes."""
    maml = FusedMAML(OverSamples(), inner_lr=0.1, loss="mse", backend="fused")
    x, y = torch.rand(2, 4, 3), torch.rand(2, 5, 3)
    with pytest.raises(ValueError, match=r"it slides over the samples, which is fused where .* are of one size"):
        maml(x, x, y, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_meta_gradient(machine, dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True), nn.ConvTranspose2d(8, 4, 2, 2), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    data = episode((3, 7, 7), dtype=dtype)
    if dtype == torch.float32:
        as_good_as_the_reference(model, data, 2)
    else:
        check_meta_gradient(model.double(), "cross_entropy", data, 0.1, 2)

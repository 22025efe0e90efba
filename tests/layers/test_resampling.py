"""Resampling, adaptive pools, shuffles, padding by the image itself, and sums of windows; layers on volumes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.layers.test_convolutions import SIZES, between


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def interpolated(axes: int, mode: str, **options: object) -> object:
    return pytest.param(axes, partial(F.interpolate, mode=mode, **options), id=f"{axes}d {mode} {options}")


@pytest.mark.parametrize(
    ("axes", "function"),
    [
        interpolated(1, "nearest", scale_factor=2),
        interpolated(1, "nearest", size=13),
        interpolated(1, "linear", scale_factor=1.5),
        interpolated(2, "nearest", scale_factor=(2, 3)),
        interpolated(2, "nearest", size=(4, 9)),
        interpolated(2, "nearest-exact", size=(10, 3)),
        interpolated(2, "bilinear", scale_factor=2),
        interpolated(2, "bilinear", scale_factor=2, align_corners=True),
        interpolated(2, "bilinear", scale_factor=1.3, recompute_scale_factor=True),
        interpolated(2, "bilinear", size=(3, 11)),
        interpolated(2, "bilinear", size=(1, 5), align_corners=True),
        interpolated(2, "bilinear", size=(3, 2), antialias=True),
        interpolated(2, "bicubic", scale_factor=2),
        interpolated(2, "bicubic", size=(9, 4), align_corners=True),
        interpolated(2, "bicubic", size=(3, 4), antialias=True),
        interpolated(2, "area", size=(4, 4)),
        interpolated(3, "nearest", scale_factor=2),
        interpolated(3, "trilinear", scale_factor=2),
        interpolated(3, "trilinear", size=(3, 5, 2), align_corners=True),
    ],
)
def test_interpolation(check_passes, axes, function):
    check_passes(between(Applied(function), axes), (3, *SIZES[axes]), n=2)


POOLS = {
    "mean 1d": (1, nn.AdaptiveAvgPool1d(4)),
    "mean 2d": (2, nn.AdaptiveAvgPool2d((3, 2))),
    "mean 2d, of more": (2, nn.AdaptiveAvgPool2d((9, None))),
    "mean 3d": (3, nn.AdaptiveAvgPool3d((2, 2, 3))),
    "mean 3d, of all": (3, nn.AdaptiveAvgPool3d(1)),
    "maximum 1d": (1, nn.AdaptiveMaxPool1d(3)),
    "maximum 2d": (2, nn.AdaptiveMaxPool2d((1, 5))),
    "maximum 3d": (3, nn.AdaptiveMaxPool3d((5, 2, 1))),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_adaptive_pool(check_passes, pool):
    axes, layer = pool
    check_passes(between(layer, axes), (3, *SIZES[axes]), n=2)


def test_adaptive_pool_of_all_with_channels_last(check_passes):
    """torch gives the result other strides."""
    turned = Applied(lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1))
    check_passes(nn.Sequential(nn.Linear(4, 3), turned, nn.Tanh(), nn.Linear(3, 2)), (5, 4), n=3)


def test_adaptive_pool_of_features(check_passes):
    """Samples are where channels would be."""
    check_passes(nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.AdaptiveAvgPool1d(3), nn.Linear(3, 2)), (3,), n=4)


@pytest.mark.parametrize(
    ("axes", "layer"),
    [
        (1, nn.ReflectionPad1d((3, 2))),
        (2, nn.ReflectionPad2d((1, 2, 0, 3))),
        (3, nn.ReflectionPad3d(1)),
        (1, nn.ReplicationPad1d((11, 1))),
        (2, nn.ReplicationPad2d((0, 2, 3, 1))),
        (3, nn.ReplicationPad3d((1, 0, 2, 1, 0, 1))),
        (1, nn.CircularPad1d((3, 2))),
        (2, nn.CircularPad2d((-1, 2, 3, 0))),
        (3, nn.CircularPad3d((1, 0, 2, 1, 0, 1))),
        (2, nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular")),
        (1, nn.ConstantPad1d((2, 1), 0.7)),
        (2, nn.ConstantPad2d((1, 0, 2, -1), -1.5)),
        (2, nn.ZeroPad2d((3, 1, 0, 2))),
        (3, nn.ConstantPad3d((1, 2, 0, 1, 1, 0), 2.0)),
    ],
    ids=str,
)
def test_padding(check_passes, axes, layer):
    check_passes(between(layer, axes), (3, *SIZES[axes]), n=2)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.channel_shuffle(torch.tanh(self.first(x)), 4)
        x = torch.sin(F.pixel_shuffle(x, 2))
        return self.last(F.pixel_unshuffle(x, 2))


def test_shuffles(check_passes):
    check_passes(Shuffled(), (3, 5, 3), n=2)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [((3, 3), {"padding": 1}), ((2, 3), {"stride": (2, 1)}), ((2, 2), {"dilation": 2, "padding": (1, 2)})],
    ids=str,
)
def test_sums_of_windows(check_passes, kernel, options):
    def folded(x: Tensor) -> Tensor:
        return F.fold(torch.sin(F.unfold(x, kernel, **options)), x.shape[2:], kernel, **options)

    check_passes(between(Applied(folded), 2), (3, 6, 5), n=2)


class OnVolumes(nn.Module):
    """Normalisations [n, channels, depth, height, width], also with a scale that is computed."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv3d(2, 4, 3, padding=1), norm, nn.Linear(3, 4)
        self.code = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        x = F.batch_norm(x, None, None, torch.exp(self.scale(self.code)), self.scale.bias, training=True)
        return x.amax((2, 3)).flatten(1)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm3d(4), nn.GroupNorm(2, 4), nn.InstanceNorm3d(4, affine=True)],
    ids=str,
)
def test_normalisations_of_volumes(check_passes, norm):
    check_passes(OnVolumes(norm), (2, 3, 2, 4), n=3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.AdaptiveMaxPool2d((3, 2)), "an adaptive maximum of [7, 5] elements in [3, 2] parts is not fused; one whose "
         "sizes divide is"),
        (Applied(lambda x: F.max_unpool2d(*F.max_pool2d(x[..., :6, :4], 2, return_indices=True), 2)),
         "no fused layer serves it (max_unpool2d)"),
    ],
    ids=("adaptive maximum", "unpooling"),
)  # fmt: skip
def test_refused_in_words(layer, message):
    maml = FusedMAML(nn.Sequential(nn.Conv2d(3, 4, 1), layer), 0.1, loss="mse")
    x = torch.rand(2, 3, 3, 7, 5)
    y = torch.stack([maml.model(task) for task in x]).detach()
    assert message in str(maml.explain(x, y))

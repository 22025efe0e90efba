"""A convolution of each channel by itself becomes one layer, without the windows of its input in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.capture.capture import capture
from maml_cuda.plan.reader import graph_of
from tests.plan.small_models import CLASSES, Net, episode, fused_is_right, made, weight

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 6
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SAMPLES = {1: (2, 9), 2: (2, 7, 5), 3: (2, 4, 3, 5)}


def kinds(model: nn.Module, sample: tuple[int, ...]) -> Counter[str]:
    """How many nodes of each kind the graph of a model has."""
    record = capture(model, torch.zeros(3, *sample, dtype=torch.float64)).record
    return Counter(node.kind for node in graph_of(model, record).nodes)


def inside(axes: int, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> Callable[[], Net]:
    """A function of CHANNELS channels, between a convolution and a linear layer on the mean of the pixels."""

    def make() -> Net:
        first = CONV[axes - 1](2, CHANNELS, 1)
        made_parts = {name: part() for name, part in parts.items()}
        return Net(
            lambda m, x: m.last(run(m, m.first(x).tanh()).flatten(2).mean(2)),
            first=first,
            last=nn.Linear(CHANNELS, CLASSES),
            **made_parts,
        )

    return make


def layer(axes: int, *args: Any, **options: Any) -> Callable[[], Net]:
    make = CONV[axes - 1]
    return inside(
        axes, lambda m, x: m.layer(x), layer=lambda: make(CHANNELS, CHANNELS, *args, groups=CHANNELS, **options)
    )


def last_axis(m: Any, x: Tensor) -> Tensor:
    """Channels are the last axis between the layers, as in ConvNeXt."""
    x = m.norm(m.layer(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return m.layer(x)


def frames(m: Any, x: Tensor) -> Tensor:
    """The rows of an image as samples of their own."""
    rows = x.permute(0, 2, 1, 3).flatten(0, 1)  # [n * height, channels, width]
    return m.layer(rows).unflatten(0, (-1, x.shape[2])).permute(0, 2, 1, 3)


MODELS: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {  # axes, how many, the model
    "of signals": (1, 1, layer(1, 3, padding=1)),
    "with a bias": (2, 1, layer(2, 3, bias=True)),
    "strided and dilated": (2, 1, layer(2, (3, 2), stride=2, dilation=(1, 2), padding=(1, 2), bias=False)),
    "reflected": (2, 1, layer(2, 3, padding=1, padding_mode="reflect")),
    "of one tap": (2, 1, layer(2, 1)),
    "without padding": (2, 1, layer(2, 3, padding="valid")),
    "by numbers for all axes": (
        2,
        1,
        inside(2, lambda m, x: F.conv2d(x, m.w, None, (2,), (1,), (2,), CHANNELS), w=lambda: weight(CHANNELS, 1, 3, 3)),
    ),
    "of volumes": (3, 1, layer(3, (3, 1, 2), padding=(1, 0, 1))),
    "in ConvNeXt": (
        2,
        2,
        inside(
            2,
            last_axis,
            layer=lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
            norm=lambda: nn.LayerNorm(CHANNELS),
        ),
    ),
    "by a computed weight": (
        2,
        1,
        inside(
            2,
            lambda m, x: F.conv2d(x, m.w * m.scale / m.w.norm(), padding=1, groups=CHANNELS),
            w=lambda: weight(CHANNELS, 1, 3, 3),
            scale=lambda: weight(CHANNELS, 1, 1, 1),
        ),
    ),
    "by a transposed weight": (
        2,
        1,
        inside(
            2,
            lambda m, x: F.conv2d(x, m.w.permute(2, 0, 1).unsqueeze(1), padding=1, groups=CHANNELS),
            w=lambda: weight(3, 3, CHANNELS),
        ),
    ),
    "by a fixed weight": (
        2,
        1,
        inside(2, lambda m, x: F.conv2d(x, x.new_full((CHANNELS, 1, 3, 3), 0.1), padding=1, groups=CHANNELS)),
    ),
    "of rows": (
        2,
        1,
        inside(2, frames, layer=lambda: nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_layer(name):
    axes, count, make = MODELS[name]
    model = made(make)
    found = kinds(model, SAMPLES[axes])
    assert found["depthwise"] == count
    assert found["windows"] == 0
    fused_is_right(model, episode(SAMPLES[axes]))


def test_of_the_input():
    """It has channels first in memory, and is copied."""
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(30, CLASSES)))
    assert kinds(model, SAMPLES[2])["depthwise"] == 1
    fused_is_right(model, episode(SAMPLES[2]))


def test_several_outputs_of_a_channel_are_products_of_windows():
    model = made(inside(2, lambda m, x: m.layer(x)[:, ::2], layer=lambda: nn.Conv2d(6, 12, 3, groups=6)))
    found = kinds(model, SAMPLES[2])
    assert found["depthwise"] == 0
    assert found["windows"] == 1
    fused_is_right(model, episode(SAMPLES[2]))


def test_memory():
    """Less than the windows alone would take."""
    channels, size, taps = 16, 24, 49
    depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    model = nn.Sequential(nn.Conv2d(2, channels, 1), depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    maml = FusedMAML(model, 0.1, 1, loss="mse", backend="fused")
    x = torch.zeros(1, 5, 2, size, size)
    assert maml.memory_estimate(x, x) < 2 * 5 * taps * channels * size * size * x.element_size()

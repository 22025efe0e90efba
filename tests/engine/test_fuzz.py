"""Random small networks of every layer kind, shape and option, against the reference.

Each case draws a graph, a shape, a loss, rates, adapted parameters and steps, builds the module that computes it, and
compares the whole meta-gradient in float64. MAML_CUDA_FUZZ sets the number of cases.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from maml_cuda import FusedMAML
from tests.conftest import MACHINES, check_meta_gradient

CASES = int(os.environ.get("MAML_CUDA_FUZZ", "300"))

# Normalising a constant gives zero plus rounding noise, so that two correct computations may take different branches of
# a ReLU or a max-pool behind it. A random net therefore has either normalisations or kinks, never both.
SMOOTH = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.GELU, nn.Identity]
KINKED = [nn.ReLU, nn.LeakyReLU, nn.ELU]


class Graph(nn.Module):
    """A sequence of layers; with `skips[i]` the input of layer i is added to its output, which has the same shape."""

    def __init__(self, layers: list[nn.Module], skips: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips = skips

    def forward(self, x):
        for layer, skip in zip(self.layers, self.skips, strict=True):
            x = layer(x) + x if skip else layer(x)
        return x


CONV, NORM = {1: nn.Conv1d, 2: nn.Conv2d}, {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}
MAX_POOL, AVG_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d}, {1: nn.AvgPool1d, 2: nn.AvgPool2d}
TO_ONE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}


@st.composite
def norms(draw, channels: int, sizes: tuple[int, ...]):
    """A normalisation over the samples or within each sample."""
    kinds = ["batch", "group", "layer", *(["instance"] if math.prod(sizes) > 1 else [])]
    kind, affine = draw(st.sampled_from(kinds)), draw(st.booleans())
    if kind == "group":
        groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
        return nn.GroupNorm(groups, channels, eps=0.1, affine=affine)
    if kind == "layer":
        return nn.LayerNorm([channels, *sizes], eps=0.1, elementwise_affine=affine)
    return (NORM if kind == "batch" else INSTANCE)[len(sizes)](channels, eps=0.1, affine=affine)


@st.composite
def spatial_layers(draw, channels: int, sizes: tuple[int, ...], normed: bool):
    """Up to five layers on a signal or an image, then a flatten or a pool to one position."""
    layers: list[nn.Module] = []
    skips: list[bool] = []
    axes = len(sizes)

    def slid(kernel, stride, padding):
        return tuple((s + 2 * p - k) // d + 1 for s, k, d, p in zip(sizes, kernel, stride, padding, strict=True))

    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "conv", "act", "act", "avg", "same", *(["norm"] if normed else ["max"])]))
        if kind == "conv":
            kernel = tuple(draw(st.integers(1, min(4, size))) for size in sizes)
            stride = tuple(draw(st.integers(1, 3)) for _ in sizes)
            padding = tuple(draw(st.integers(0, 2)) for _ in sizes)
            out = draw(st.integers(1, 9))
            layers.append(CONV[axes](channels, out, kernel, stride, padding, bias=draw(st.booleans())))
            channels, sizes = out, slid(kernel, stride, padding)
            skips.append(False)
        elif kind == "same":
            size = draw(st.sampled_from([1, 3, 5]))
            layers.append(CONV[axes](channels, channels, size, padding="same"))
            skips.append(draw(st.booleans()))
        elif kind == "norm":
            layers.append(draw(norms(channels, sizes)))
            skips.append(draw(st.booleans()))
        elif kind == "act":
            layers.append(draw(st.sampled_from(SMOOTH if normed else SMOOTH + KINKED))())
            skips.append(draw(st.booleans()))
        else:
            kernel = draw(st.integers(1, min(3, *sizes)))
            stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, kernel // 2))
            layers.append((MAX_POOL if kind == "max" else AVG_POOL)[axes](kernel, stride, padding))
            sizes = slid([kernel] * axes, [stride] * axes, [padding] * axes)
            skips.append(False)
    if draw(st.booleans()):
        layers.append(TO_ONE[axes](1))
        skips.append(False)
        sizes = (1,) * axes
    layers.append(nn.Flatten())
    skips.append(False)
    return layers, skips, channels * math.prod(sizes)


@st.composite
def cases(draw):
    axes, normed = draw(st.sampled_from([0, 1, 2, 2])), draw(st.booleans())
    n = draw(st.integers(2, 5))
    layers: list[nn.Module] = []
    skips: list[bool] = []
    torch.manual_seed(draw(st.integers(0, 2**16)))
    if axes:
        channels, *sizes = (draw(st.integers(1, 4)), *(draw(st.integers(1, 7)) for _ in range(axes)))
        sample: tuple[int, ...] = (channels, *sizes)
        layers, skips, features = draw(spatial_layers(channels, tuple(sizes), normed))
    else:
        features = draw(st.integers(1, 20))
        sample = (features,)
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 20))
        layers += [nn.Linear(features, width, bias=draw(st.booleans()))]
        skips += [False]
        if normed and draw(st.booleans()):
            layers += [draw(norms(width, ()))]
            skips += [False]
        layers += [draw(st.sampled_from(SMOOTH if normed else SMOOTH + KINKED))()]
        skips += [draw(st.booleans())]
        features = width
    classes = draw(st.integers(1, 6))
    layers += [nn.Linear(features, classes)]
    skips += [False]
    model = Graph(layers, skips).double()
    names = [name for name, _ in model.named_parameters()]
    frozen = draw(st.sets(st.sampled_from(names), max_size=len(names) - 1)) if draw(st.booleans()) else set()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    trainable = [name for name in names if name not in frozen]
    adapt = draw(st.none() | st.lists(st.sampled_from(trainable), min_size=1, unique=True))
    loss = draw(st.sampled_from(["cross_entropy", "mse"]))
    tasks, n_query, steps = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(0, 3))
    data = []
    for count in (n, n_query):
        data.append(torch.randn(tasks, count, *sample, dtype=torch.float64))
        data.append(
            torch.randint(0, classes, (tasks, count))
            if loss == "cross_entropy"
            else torch.randn(tasks, count, classes, dtype=torch.float64)
        )
    rate: object = 0.1
    if draw(st.booleans()):
        forms = {n: draw(st.sampled_from(["number", "scalar", "steps", "shape", "both"])) for n in adapt or trainable}
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        make = {
            "number": lambda shape: 0.05,
            "scalar": lambda shape: nn.Parameter(torch.rand(()).double() * 0.1),
            "steps": lambda shape: nn.Parameter(torch.rand(steps, *shape).double() * 0.1),
            "shape": lambda shape: nn.Parameter(torch.rand(shape).double() * 0.1),
            "both": lambda shape: nn.Parameter(torch.rand(steps, *shape).double() * 0.1),
        }
        rate = {n: make[forms[n] if shapes[n] != (steps,) else "scalar"](shapes[n]) for n in adapt or trainable}
    return model, loss, data, rate, steps, adapt, draw(st.booleans())


@pytest.mark.parametrize("machine", [*MACHINES, "cuda_small_tiles"], indirect=True)
@settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,  # `machine` is the same for all examples
    ],
)  # fmt: skip
@given(case=cases())
def test_random_graphs(machine, case):
    model, loss, data, rate, steps, adapt, first_order = case
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        try:  # torch refuses one value per channel, as FusedMAML does: test_call_errors.py
            FusedMAML(model, 0.1, 0, loss=loss, backend="reference")(*data)
        except ValueError as error:
            assume("more than 1 value per channel" not in str(error))
            raise
    maml = check_meta_gradient(
        model, loss, data, rate, steps, adapt_params=adapt, first_order=first_order, tolerance=1e-9
    )
    assert maml.backend == ("cpu" if machine == "cpu" else "cuda")

"""Convolutions of small outputs, whose last blocks compute the normalisation that follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML
from tests.conftest import check_meta_gradient
from tests.cuda.kernel_models import KERNELS, check_bits_of_chunks, episodes
from tests.emulated import log

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]


def strided(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Four blocks as those of the Omniglot net: the second and the third are one kernel each."""
    layers: list[nn.Module] = []
    relu = nn.ReLU()
    for inputs, outputs, function in ((1, 4, relu), (4, 6, relu), (6, 5, nn.LeakyReLU(0.2)), (5, 4, relu)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=outputs == 5), nn.BatchNorm2d(outputs), function]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 4)).to(dtype)


def wide(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two columns of tiles of 32 channels, three rows of tiles; and no function after the second convolution."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 34, 3, padding=1, bias=False),
        nn.BatchNorm2d(34), nn.ReLU(), nn.Conv2d(34, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 4), nn.Flatten(),
    ).to(dtype)  # fmt: skip


SAMPLES = {strided: (1, 13, 13), wide: (1, 8, 8)}
IN_ONE = {strided: 2, wide: 2}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("make", SAMPLES)
def test_meta_gradients_are_exact(make: Any, first_order: bool) -> None:
    data = episodes(SAMPLES[make], torch.float64)
    maml = check_meta_gradient(make(), "cross_entropy", data, 0.1, 2, first_order=first_order)
    assert maml.backend == "cuda"


@pytest.mark.parametrize("make", SAMPLES)
def test_two_passes_are_one_kernel(machine: str, make: Any) -> None:
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    if machine == "cuda_small_tiles" and make is wide:
        pytest.skip("the smaller tiles are enough blocks here")
    maml = FusedMAML(make(), 0.1, 2, backend="fused", cuda_graphs=False)
    with log() as logged:
        maml(*episodes(SAMPLES[make], torch.float64))
        names = [launch["kernel"].partition("<")[0] for launch in logged()]
    passes = 5  # two inner steps, the query, and the products of the two steps
    assert sum("forward_normalised_kernel" in name for name in names) == passes * IN_ONE[make]
    assert not any("normalise_forward" in name for name in names)


@pytest.mark.parametrize("make", SAMPLES)
def test_bits_do_not_depend_on_the_number_of_tasks(make: Any) -> None:
    check_bits_of_chunks(make(), episodes(SAMPLES[make], torch.float64, tasks=3), 2)

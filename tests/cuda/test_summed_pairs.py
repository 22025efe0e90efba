"""Convolutions that add up their input's cotangent for the normalisation before them, within a meta-step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML
from tests.conftest import check_meta_gradient
from tests.cuda.kernel_models import KERNELS, check_bits_of_chunks, episodes, kernels

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

SAMPLE = (1, 20, 20)  # the blocks behind the first one are too large to be computed by one block of threads


def blocks(bent: bool = False) -> nn.Module:
    """Leaky ReLU; ReLU and a pool, before a strided convolution. bent: a function that leaves it to the norm."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ELU() if bent else nn.LeakyReLU(0.1),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 9, 3, 2, 1), nn.BatchNorm2d(9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_exact(first_order: bool) -> None:
    data = episodes(SAMPLE, torch.float64, tasks=2)
    maml = check_meta_gradient(blocks(), "cross_entropy", data, 0.1, 2, first_order=first_order)
    assert maml.backend == "cuda"


def test_the_normalisations_have_no_pass_for_their_sums(machine: str) -> None:
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    launched: list[Counter[str]] = []
    for bent in (False, True):
        maml = FusedMAML(blocks(bent), 0.1, 2, backend="fused", cuda_graphs=False)
        launched.append(kernels(maml, episodes(SAMPLE, torch.float64, tasks=1)))
    straight, elu = launched
    sums = ("normalise_backward_sums_kernel", "normalise_backward_tangent_sums_kernel")
    assert [straight[kernel] for kernel in sums] == [0, 0]
    assert [elu[kernel] for kernel in sums] == [3, 2]  # two inner steps and the query; two products
    for kernel in ("gradients_kernel", "normalise_backward_kernel", "normalise_backward_tangent_kernel"):
        assert straight[kernel] == elu[kernel] > 0, kernel


def test_bits_do_not_depend_on_the_number_of_tasks() -> None:
    check_bits_of_chunks(blocks(), episodes(SAMPLE, torch.float64, tasks=3), 1)

"""Steps of the inner and the outer loop that are part of the launch of the first layer's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML
from tests.conftest import check_meta_gradient
from tests.cuda.kernel_models import KERNELS, check_bits_of_chunks, episodes, kernels

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

SAMPLE = (3, 6, 4)


def net() -> nn.Module:
    """Two groups of channels in the first layer, whose images have a plane for each channel; a flattened image."""
    return nn.Sequential(
        nn.Conv2d(3, 34, 3, padding=1), nn.BatchNorm2d(34), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(34, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_exact(first_order: bool) -> None:
    maml = check_meta_gradient(net(), "cross_entropy", episodes(SAMPLE, torch.float64), 0.1, 2, first_order=first_order)
    assert maml.backend == "cuda"


def test_rates_and_parameters_that_are_not_adapted() -> None:
    """A rate for each element of the first layer's weight; its BatchNorm's bias and the last bias do not move."""
    model = net()
    rates = {
        name: nn.Parameter(torch.full(p.shape if name == "0.weight" else (), 0.1, dtype=torch.float64))
        for name, p in model.named_parameters()
        if name not in ("1.bias", "8.bias")
    }
    data = episodes(SAMPLE, torch.float64, tasks=2)
    check_meta_gradient(model, "cross_entropy", data, rates, 2, adapt_params=lambda name: name in rates)


def test_a_step_and_a_flatten_have_no_launch(machine: str) -> None:
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    maml = FusedMAML(net(), 0.1, 2, backend="fused", cuda_graphs=False)
    launched = kernels(maml, episodes(SAMPLE, torch.float64, tasks=2))
    assert launched["stem_backward_kernel"] == 5  # two inner steps, the query, and the products of the two steps
    for kernel in ("descend_kernel", "direction_kernel", "retreat_kernel", "transpose_elements", "transpose_tiles"):
        assert launched[kernel] == 0, kernel


def test_bits_do_not_depend_on_the_number_of_tasks() -> None:
    check_bits_of_chunks(net(), episodes(SAMPLE, torch.float64, tasks=2), 2)

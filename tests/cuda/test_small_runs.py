"""Runs of small instructions in one kernel, within a program of the batched executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, convert_per_step, reference
from tests.conftest import assert_close, check_meta_gradient, run
from tests.cuda.kernel_models import KERNELS, conv, episodes, kernels
from tests.emulated import log

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]


def strided(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The Omniglot net of the MAML paper, smaller."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 4), (4, 6)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).to(dtype)


def pooled(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A max-pool in the last block, functions that bend, and a flatten."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4),
    ).to(dtype)  # fmt: skip


class Residual(nn.Module):
    """Small layers between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.sigmoid(torch.tanh(self.second(x)) + x)
        return self.head(self.third(x).mean((2, 3)))


def residual(dtype: torch.dtype = torch.float64) -> nn.Module:
    return Residual().to(dtype)


def features(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Linear layers that take the statistics of their output for a BatchNorm, more rows than one entry has."""
    return nn.Sequential(
        nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 6, bias=False), nn.BatchNorm1d(6), nn.LeakyReLU(0.2), nn.Linear(6, 4)
    ).to(dtype)


def wide(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A last normalisation that is too large for one block: 10,240 elements for 4 images."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(640, 4),
    ).to(dtype)  # fmt: skip


SAMPLES: dict[Callable[..., nn.Module], tuple[int, ...]] = {
    strided: (1, 12, 12),
    pooled: (2, 6, 6),
    residual: (2, 5, 5),
    features: (3,),
    wide: (1, 16, 16),
    conv: (2, 6, 6),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("make", SAMPLES)
def test_meta_gradients_are_exact(make: Any, first_order: bool) -> None:
    data = episodes(SAMPLES[make], torch.float64)
    maml = check_meta_gradient(make(), "cross_entropy", data, 0.1, 2, first_order=first_order)
    assert maml.backend == "cuda"


def test_statistics_of_many_rows() -> None:
    """More rows than an entry of the statistics stands for, of which the last is not full."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 150, 3).double(), torch.randint(4, (2, 150))
    check_meta_gradient(features(), "cross_entropy", [x[:, :70], y[:, :70], x[:, 70:], y[:, 70:]], 0.1, 2)


@pytest.mark.parametrize("first_order", [False, True])
def test_a_head_is_one_kernel(machine: str, first_order: bool) -> None:
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    maml = FusedMAML(strided(), 0.1, 2, first_order=first_order, backend="fused", cuda_graphs=False)
    launched = kernels(maml, episodes(SAMPLES[strided], torch.float64))
    passes = 3 if first_order else 5  # two inner steps, the query, and the products of the two steps
    assert launched["small_run_kernel"] == passes
    assert launched["gradients_kernel"] == passes  # of the second convolution; none is of the linear layer
    for alone in ("normalise_forward", "normalise_backward", "mean_of_all_kernel", "value_kernel", "tangent_kernel"):
        assert launched[alone] == 0, alone


def test_several_blocks_begin_a_run(machine: str) -> None:
    """A normalisation that is too large for one block, before small layers."""
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    maml = FusedMAML(wide(), 0.1, 2, backend="fused", cuda_graphs=False)
    with log() as logged:
        maml(*episodes(SAMPLES[wide], torch.float64))
        grids = [launch["grid"] for launch in logged() if "::small_run_kernel" in launch["kernel"]]
        others = [launch["kernel"] for launch in logged() if "::normalise_forward" in launch["kernel"]]
    assert len(grids) == 5  # two inner steps, the query, and the products of the two steps
    assert all(blocks > 1 and tasks == 3 for blocks, _, tasks in grids)
    assert not others


def test_a_multi_step_loss() -> None:
    data, weights = episodes(SAMPLES[pooled], torch.float64), [0.2, 0.3, 0.5]
    maml = FusedMAML(pooled(), 0.1, 2, query_weights=weights, backend="fused")
    loss, grads = run(maml, data)
    expected_loss, expected = reference.meta_gradient(maml.model, "cross_entropy", *data, 0.1, 2, query_weights=weights)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    assert_close(grads, expected, 1e-10)


def test_some_parameters_are_adapted() -> None:
    data = episodes(SAMPLES[pooled], torch.float64)
    check_meta_gradient(pooled(), "cross_entropy", data, 0.1, 2, adapt_params=lambda name: name[0] in "38")


def test_learned_rates() -> None:
    """A rate for each element of a weight, for each step of it, or for a whole parameter."""
    model = strided()

    def shape(name: str, p: Tensor) -> tuple[int, ...]:
        return (2, *p.shape) if name[0] == "3" else tuple(p.shape) if name[0] == "8" else ()

    rates = {
        name: nn.Parameter(torch.full(shape(name, p), 0.1, dtype=torch.float64)) for name, p in model.named_parameters()
    }
    data = episodes(SAMPLES[strided], torch.float64)
    check_meta_gradient(model, "cross_entropy", data, rates, 2)


def test_per_step_parameters() -> None:
    model = convert_per_step(strided(), 2)
    check_meta_gradient(model, "cross_entropy", episodes(SAMPLES[strided], torch.float64), 0.1, 2)


@pytest.mark.parametrize("make", [strided, residual, wide])
def test_chunks_graphs_and_the_branch_change_no_bit(make: Any) -> None:
    """With graphs, the images' moments are a branch beside the inner loop; without, they come first."""
    data = episodes(SAMPLES[make], torch.float64, tasks=3)
    model = make()
    expected = run(FusedMAML(model, 0.1, 2, cuda_graphs=False, backend="fused"), data)
    for options in ({"task_chunk": 2}, {"task_chunk": 1}):
        maml = FusedMAML(model, 0.1, 2, backend="fused", **options)
        for _ in range(3):  # the second call captures a graph
            loss, grads = run(maml, data)
            assert torch.equal(loss, expected[0])
            assert all(torch.equal(grads[name], expected[1][name]) for name in grads)


def test_a_small_network_is_one_run(machine: str) -> None:
    """Of kinds that the megakernel lacks. The other kernels send addresses, pack parameters and add up tasks."""
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    maml = FusedMAML(features(), 0.1, 2, backend="fused", cuda_graphs=False)
    launched = kernels(maml, episodes(SAMPLES[features], torch.float64))
    assert launched["small_run_kernel"] == 1
    assert launched.total() == 4

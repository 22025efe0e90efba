"""Gradients of 3 x 3 convolutions by the matrix instructions of a warpgroup (csrc/cuda/conv2d_raster_gradients.cu)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from tests.conftest import run
from tests.cuda.kernel_models import KERNELS, check_bits_of_chunks, episodes, kernels
from tests.cuda.test_backend import BANDS

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

SAMPLE = (2, 13, 11)


def net(channels: int) -> nn.Module:
    """Smooth. The second and the third convolution are served. No function stands before the third: then its input
    gradient comes with the two sums of cotangents for the BatchNorm (csrc/cuda/sum_cotangents.h)."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4),
    ).double()  # fmt: skip


def in_float32(data: list[Tensor]) -> list[Tensor]:
    return [t.float() if t.is_floating_point() else t for t in data]


@pytest.mark.parametrize("precision", ["bf16x3", "bfloat16"])
@pytest.mark.parametrize("channels", [32, 64])
def test_meta_gradients_have_the_error_of_the_precision(channels: int, precision: str, allow_precision: None) -> None:
    model, data = net(channels), episodes(SAMPLE, torch.float64, tasks=2)
    _, expected = reference.meta_gradient(model, "cross_entropy", *data, 0.1, 1)
    maml = FusedMAML(model.float(), 0.1, 1, precision=precision, backend="fused")
    _, grads = run(maml, in_float32(data))
    total = torch.stack([e.norm() for e in expected.values()]).norm()
    error = torch.stack([(grads[n].double() - e).norm() for n, e in expected.items()]).norm() / total
    least, most = BANDS[precision]
    assert least <= error <= most, f"{error:.1e}"


def test_two_layers_are_served_with_their_sums(machine: str, allow_precision: None) -> None:
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    maml = FusedMAML(net(32).float(), 0.1, 1, precision="bf16x3", backend="fused", cuda_graphs=False)
    launched = kernels(maml, in_float32(episodes(SAMPLE, torch.float64, tasks=1)))
    assert launched["raster_gradients_kernel"] == 2 * 3  # of two layers: inner step, query, and its product
    assert launched["gradients_kernel"] == 0
    assert launched["normalise_backward_kernel"] == 2  # inner step and query
    assert launched["normalise_backward_sums_kernel"] == launched["normalise_backward_tangent_sums_kernel"] == 0


def test_bits_do_not_depend_on_the_number_of_tasks(allow_precision: None) -> None:
    data = in_float32(episodes(SAMPLE, torch.float64, tasks=2))
    check_bits_of_chunks(net(32).float(), data, 1, precision="bf16x3")

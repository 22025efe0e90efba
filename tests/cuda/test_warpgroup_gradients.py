"""Gradients of 3 x 3 convolutions by the matrix instructions of a warpgroup (csrc/cuda/conv2d_raster_gradients.cu)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, reference
from tests.conftest import run
from tests.cuda.kernel_models import KERNELS, episodes
from tests.cuda.test_backend import BANDS
from tests.emulated import log

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

SAMPLE = (2, 13, 11)


def net(channels: int) -> nn.Module:
    """Smooth. The second and the third convolution are served, with the sums for the BatchNorms before them."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16x3", "bfloat16"])
@pytest.mark.parametrize("channels", [32, 64])
def test_meta_gradients_have_the_error_of_the_precision(
    machine: str, channels: int, precision: str, allow_precision: None
) -> None:
    model, data = net(channels), episodes(SAMPLE, torch.float64, tasks=2)
    _, expected = reference.meta_gradient(model, "cross_entropy", *data, 0.1, 1)
    single, data32 = model.float(), [t.float() if t.is_floating_point() else t for t in data]
    maml = FusedMAML(single, 0.1, 1, precision=precision, backend="fused", cuda_graphs=False)
    if machine == "cuda":
        _, grads = run(maml, data32)
    else:
        with log() as logged:
            _, grads = run(maml, data32)
            names = [launch["kernel"].partition("<")[0].rpartition("::")[2] for launch in logged()]
        assert names.count("raster_gradients_kernel") == 2 * 3  # of two layers: inner step, query, and its product
        assert "gradients_kernel" not in names
    total = torch.stack([e.norm() for e in expected.values()]).norm()
    error = torch.stack([(grads[n].double() - e).norm() for n, e in expected.items()]).norm() / total
    least, most = BANDS[precision]
    assert least <= error <= most, f"{error:.1e}"


def test_bits_do_not_depend_on_the_number_of_tasks(allow_precision: None) -> None:
    model = net(32).float()
    data = [t.float() if t.is_floating_point() else t for t in episodes(SAMPLE, torch.float64, tasks=2)]
    (loss, grads), (chunked, others) = (
        run(FusedMAML(model, 0.1, 1, precision="bf16x3", backend="fused", task_chunk=n), data) for n in (2, 1)
    )
    assert torch.equal(loss, chunked)
    assert all(torch.equal(grads[name], others[name]) for name in grads)

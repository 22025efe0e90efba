"""Models and episodes for the tests of the CUDA backend, which run on the emulations and on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.conftest import run
from tests.emulated import log

KERNELS = pytest.mark.parametrize("machine", ["cuda_emulated", "cuda_small_tiles", "cuda"], indirect=True)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 17), nn.Tanh(), nn.Linear(17, 9), nn.SiLU(), nn.Linear(9, 4)).to(dtype)


def conv(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(72, 4),
    ).to(dtype)  # fmt: skip


SAMPLES = {mlp: (3,), conv: (2, 6, 6)}


def episodes(sample: tuple[int, ...], dtype: torch.dtype, tasks: int = 3, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(tasks, 9, *sample).to(dtype)
    y = torch.randint(4, (tasks, 9))
    return [x[:, :5], y[:, :5], x[:, 5:], y[:, 5:]]


def kernels(maml: FusedMAML, data: list[Tensor]) -> Counter[str]:
    """How often a meta-step launches each kernel, in the emulation."""
    with log() as logged:
        maml(*data)
        return Counter(launch["kernel"].partition("<")[0].rpartition("::")[2] for launch in logged())


def check_bits_of_chunks(model: nn.Module, data: list[Tensor], steps: int, **options: Any) -> None:
    """Asserts that the tasks give the same bits one by one as together."""
    together, alone = (
        FusedMAML(model, 0.1, steps, backend="fused", task_chunk=n, **options) for n in (data[0].shape[0], 1)
    )
    (loss, grads), (chunked, others) = run(together, data), run(alone, data)
    assert torch.equal(loss, chunked)
    assert all(torch.equal(grads[name], others[name]) for name in grads)

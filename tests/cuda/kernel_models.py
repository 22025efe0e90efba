"""Models and episodes for the tests of the CUDA backend, which run on the emulations and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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

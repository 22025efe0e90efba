"""The smallest meta-steps of both executors in every precision, for compute-sanitizer.

`python -m benchmarks.gpu.smallest` runs them once on the GPU, without verification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maml_cuda import FusedMAML

from .machine import machine

PRECISIONS = ("float32", "bf16x3", "tf32", "bfloat16")


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(3, 17), nn.ReLU(), nn.Linear(17, 5)), (3,)


def conv() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(9, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5),
    ), (2, 7, 7)  # fmt: skip


def meta_steps(device: torch.device, graphs: bool = False) -> int:
    """Runs each network in each precision at second order. Returns the number of meta-steps.

    The data are made on the CPU and copied. `graphs`: runs three meta-steps each with CUDA graphs: the second captures
    a graph, and the third replays it.
    """
    count = 0
    for make in (mlp, conv):
        torch.manual_seed(0)
        model, sample = make()
        x_spt, x_qry = torch.randn(2, 2, 3, *sample, device="cpu").to(device)
        y_spt, y_qry = torch.randint(5, (2, 2, 3), device="cpu").to(device)
        for precision in PRECISIONS:
            maml = FusedMAML(model.to(device), 0.1, 2, backend="fused", precision=precision, cuda_graphs=graphs)
            for _ in range(3 if graphs else 1):
                maml.zero_grad()
                maml(x_spt, y_spt, x_qry, y_qry).loss.backward()
                count += 1
    return count


def job(emulated: bool) -> Iterator[dict[str, Any]]:
    """The job (../worker.py) that runs them."""
    device = machine(emulated)
    ran = meta_steps(device.torch_device, graphs=device.has_graphs)
    device.synchronize()
    yield {"meta_steps": ran, "say": f"{ran} meta-steps of the smallest networks"}


if __name__ == "__main__":
    ran = meta_steps(torch.device("cuda"))
    torch.cuda.synchronize()
    print(f"{ran} meta-steps")

"""The exact number of floating-point operations (FLOP) in the matrix products of a meta-step.

Direct products are counted. Winograd convolutions (csrc/cpu/product/winograd.cpp) use fewer, so a meta-step may be
faster than this count at the rate of sgemm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .workloads import Tasks, Workload


def forward_flops(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOP per sample of a forward pass over x `[N, ...]`: `(F, F1)`.

    F counts all Linear and Conv2d layers, F1 those that read x itself. A multiply-add is 2 FLOP; products with zero
    padding count.
    """
    total = first = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total, first
        depth = module.weight[0].numel()  # multiply-adds per output value
        flops = 2 * depth * output[0].numel()
        total += flops
        first += flops if inputs[0] is x else 0

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return total, first


def meta_step_flops(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> int:
    """FLOP of one meta-step that stores its activations.

    Per sample, a gradient costs `3F - F1` and a Hessian-vector product `6F - 4F1`: a layer that reads the data needs no
    gradient of its input.
    """
    total, first = forward_flops(model, tasks.x_spt[0])
    inner = workload.inner_steps * workload.support
    flops = (inner + workload.query) * (3 * total - first)
    if not first_order:
        flops += inner * (6 * total - 4 * first)
    return workload.tasks * flops

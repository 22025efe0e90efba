"""How many floating-point operations the plain matrix products of a meta-step are, counted exactly.

Winograd's tiles (csrc/cpu/product/winograd.cpp) do with fewer, so a step may take less than these at the rate of sgemm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .workloads import Tasks, Workload


def forward_flops(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """`(F, F1)`, FLOP a sample: all Linear and Conv2d layers, and those of them that read x itself.

    x is `[N, ...]`. 2 FLOP per multiply-add, products with zero padding included.
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
    """FLOP of one meta-step with saved activations; a layer that reads the data needs no data gradient.

    A gradient costs `3F - F1` per sample, an exact Hessian-vector product `6F - 4F1`.
    """
    total, first = forward_flops(model, tasks.x_spt[0])
    inner = workload.inner_steps * workload.support
    flops = (inner + workload.query) * (3 * total - first)
    if not first_order:
        flops += inner * (6 * total - 4 * first)
    return workload.tasks * flops

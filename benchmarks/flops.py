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

    F counts all Linear, Conv2d and LSTM layers, F1 the products with x itself. A multiply-add is 2 FLOP; products with
    zero padding count.
    """
    total = first = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total, first
        depth = module.weight[0].numel()  # multiply-adds per output value
        flops = 2 * depth * output[0].numel()
        total += flops
        first += flops if inputs[0] is x else 0

    def count_lstm(module: nn.LSTM, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        nonlocal total, first
        length = inputs[0].shape[1]
        of_input, of_state = (2 * length * w.numel() for w in (module.weight_ih_l0, module.weight_hh_l0))
        total += of_input + of_state
        first += of_input if inputs[0] is x else 0

    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(count))
        elif isinstance(module, nn.LSTM):
            handles.append(module.register_forward_hook(count_lstm))
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

"""The exact number of floating-point operations (FLOP) in the matrix products of a meta-step.

Direct products are counted. Winograd convolutions (csrc/cpu/product/winograd.cpp) use fewer, so a meta-step may be
faster than this count at the rate of sgemm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .workloads import Tasks, Workload


class CountProducts(TorchDispatchMode):
    """Counts the FLOP of the products that run inside: `total`, and `first`, those with an operand without gradient.

    A multiply-add is 2 FLOP; products with zero padding count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.first = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            factors = args[1:3] if func.overloadpacket is torch.ops.aten.addmm else args[:2]
            self.total += flops
            self.first += 0 if all(factor.requires_grad for factor in factors) else flops
        return result


def forward_flops(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOP per sample of a forward pass over x `[N, ...]`: `(F, F1)`.

    F counts all products, also those of derivatives that the model takes; F1 those with an operand that has no
    gradient, as the data. (Points by which the model takes derivatives have one: F1 leaves out their product.)
    """
    model, x = copy.deepcopy(model).double(), x.double()  # in float32 a recurrent layer is one operation of mkldnn
    with CountProducts() as products:
        model(x)
    return products.total // len(x), products.first // len(x)


def meta_step_flops(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> int:
    """FLOP of one meta-step that stores its activations.

    Per sample, a gradient costs `3F - F1` and a Hessian-vector product `6F - 4F1`: an operand without gradient has no
    tangent either.
    """
    total, first = forward_flops(model, tasks.x_spt[0])
    inner = workload.inner_steps * workload.support
    flops = (inner + workload.query) * (3 * total - first)
    if not first_order:
        flops += inner * (6 * total - 4 * first)
    return workload.tasks * flops

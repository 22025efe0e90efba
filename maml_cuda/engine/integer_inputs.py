"""Integers as the model's input: fused layers have them as numbers of the model's dtype (plan/integers.py).

The conversion is an op, so that torch.compile does not look into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.engine.ops import LIBRARY
from maml_cuda.plan.graph import Range
from maml_cuda.plan.integers import exact, is_integer
from maml_cuda.pytrees import Tree

LIBRARY.define(
    "from_integers(Tensor x, ScalarType dtype, str name, int[] low, int[] high, bool waits, int sets=1) -> Tensor"
)


def numbers(
    x_name: str, x: Tree, dtype: torch.dtype, ranges: Sequence[Range | None], waits: bool, sets: int = 1
) -> list[Tensor]:
    """The tensors of x [tasks, n, ...], a tensor or a pytree; those of integers in the model's dtype.

    Args:
        x_name: of the argument, for error messages.
        ranges: of each element of a sample that is an integer, in the order of the tensors.
        waits: look at the numbers now. Otherwise, on a GPU, one out of range is a device-side assertion.
        sets: of each task, which follow each other.

    Raises:
        ValueError: a number is out of its range.
    """
    converted, start = [], 0
    for name, t in pytrees.named_leaves(x_name, x):
        if t is None:
            continue
        end = start + math.prod(t.shape[2:])
        if is_integer(t.dtype):
            known = [r for r in ranges[start:end] if r is not None]
            low, high = [r.low for r in known], [r.high for r in known]
            t = torch.ops.maml_cuda.from_integers(t, dtype, name, low, high, waits, sets)
        converted.append(t)
        start = end
    return converted


def _from_integers(
    x: Tensor, dtype: torch.dtype, name: str, low: Sequence[int], high: Sequence[int], waits: bool, sets: int = 1
) -> Tensor:
    numbers = x.reshape(*x.shape[:2], -1).to(torch.int64)
    lowest, highest = (torch.tensor(bounds, device=x.device) for bounds in (low, high))
    outside = (numbers < lowest) | (numbers >= highest)
    if waits:
        _raise(outside.nonzero(), numbers, dtype, name, low, high, sets)
    else:
        torch._assert_async(~outside.any(), f"{name} must hold integers in their range")
    return x.to(dtype)


def _raise(
    outside: Tensor, numbers: Tensor, dtype: torch.dtype, name: str, low: Sequence[int], high: Sequence[int], sets: int
) -> None:
    """Raises ValueError for the first of the elements [task, sample, element] that are outside, if there is one."""
    if len(outside) == 0:
        return
    task, sample, element = outside[0].tolist()
    known, got = Range(low[element], high[element]), int(numbers[task, sample, element])
    step = f", inner step {task % sets}" if sets > 1 else ""
    where = f"got {got} (task {task // sets}{step}, sample {sample})"
    if known == exact(dtype):
        raise ValueError(
            f"{name} must hold integers of at most {known.high - 1}, up to which {dtype} has all, {where}; "
            'backend="reference" takes larger ones'
        )
    raise ValueError(f"{name} must hold indices in [{known.low}, {known.high}), {where}")


def _fake(
    x: Tensor, dtype: torch.dtype, name: str, low: Sequence[int], high: Sequence[int], waits: bool, sets: int = 1
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("from_integers", _from_integers, _device)
LIBRARY.impl("from_integers", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("maml_cuda::from_integers", _fake, lib=LIBRARY)

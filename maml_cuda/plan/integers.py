"""Integers in a graph: fused layers have them as values of the model's dtype, in which all up to 2^24 (float32) or 2^53
(float64) are exact.

So that no result is rounded, the numbers of an integer input are checked in every call, and operations that could make
larger ones are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch
from torch import Generator, Tensor

from maml_cuda.capture.errors import Unfusable
from maml_cuda.capture.record import Operation
from maml_cuda.plan.graph import Graph, Range
from maml_cuda.plan.strided import Strided

# Operations whose results are some of the given numbers, or places.
_EXACT = frozenset((
    "view", "reshape", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand",
    "repeat", "slice", "select", "unbind", "split", "split_with_sizes", "flip", "roll", "clone", "alias", "detach",
    "lift_fresh", "contiguous", "cat", "stack", "constant_pad_nd", "unfold", "tril", "triu", "where", "masked_fill",
    "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "amax", "amin", "max", "min", "abs", "neg", "sign",
    "index", "index_select", "gather", "sort", "topk", "argsort", "one_hot", "zeros_like", "ones_like", "full_like",
    "new_zeros", "new_ones", "new_full", "_to_copy",
))  # fmt: skip


MOST_DRAWN = 1 << 16  # the bound of random integers in a proof whose range is larger


def is_integer(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are whole, and not only 0 and 1."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def most_exact(dtype: torch.dtype) -> int:
    """The largest whole number up to which all are exact."""
    return int(2 / torch.finfo(dtype).eps)


def exact(dtype: torch.dtype) -> Range:
    """The range of all such numbers."""
    return Range(-most_exact(dtype), most_exact(dtype) + 1)


def note_range(graph: Graph, x: Strided, low: int, high: int) -> None:
    """Notes that the elements of this view must be in [low, high), if it is one of the integer input."""
    if x.number != 0 or not graph.integers:
        return
    atoms = [atom for axis in x.axes for atom in axis if atom.size is not None and atom.stride]
    for steps in itertools.product(*(range(atom.size or 1) for atom in atoms)):
        at = x.offset + sum(i * atom.stride for i, atom in zip(steps, atoms, strict=True))
        if (before := graph.integers[at]) is not None:
            graph.integers[at] = Range(max(before.low, low), min(before.high, high))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, ranges: Sequence[Range], generator: Generator) -> Tensor:
    """A random input [n, ...] of integers in these ranges, of each element of a sample."""
    low, high = (torch.tensor(bounds) for bounds in zip(*ranges, strict=True))
    numbers = torch.randint(MOST_DRAWN, (shape[0], len(low)), generator=generator)
    bounded = high - low < MOST_DRAWN
    return torch.where(bounded, low + numbers % (high - low), numbers).reshape(shape).to(dtype)


def check_operation(operation: Operation, of_input: Collection[int]) -> bool:
    """Whether the results of an operation are numbers of the model's integer input.

    Args:
        of_input: the ids of the operands that are.

    Raises:
        Unfusable: they may be larger ones.
    """
    if not any(id(operand) in of_input and is_integer(operand.dtype) for operand in operation.operands()):
        return False
    if not any(is_integer(result.dtype) for result in operation.results):
        return False
    if operation.name not in _EXACT:
        raise Unfusable(f"arithmetic on the integers of x is not fused ({operation.name})")
    return True


def check_conversion(operation: Operation) -> bool:
    """Whether a conversion to another dtype is `x != 0`; otherwise the values stay as they are.

    Raises:
        Unfusable: it changes them.
    """
    (given, *_), (made,) = operation.operands(), operation.results
    if made.dtype == torch.bool:
        return given.dtype != torch.bool
    if made.dtype.is_complex:
        raise Unfusable(f"a conversion to {made.dtype} is not fused")
    narrow = is_integer(made.dtype) and torch.iinfo(made.dtype).bits < 32 and given.dtype != torch.bool
    if is_integer(made.dtype) and (given.dtype.is_floating_point or narrow):
        raise Unfusable(f"a conversion of {given.dtype} to {made.dtype} is not fused")
    return False

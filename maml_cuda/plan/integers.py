"""Integers and masks in a graph: fused layers have them as values of the model's dtype, in which all up to 2^24
(float32) or 2^53 (float64) are exact.

So that no result is rounded, the numbers of an integer input are checked in every call, and operations that could make
larger ones are refused. So are those whose result torch cuts to a narrow dtype: `mask + mask` is a mask, and integers
of 8 or 16 bits overflow. Random data may not show either, so they are refused by their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from maml_cuda.capture.errors import Unfusable
from maml_cuda.capture.record import Operation
from maml_cuda.plan.graph import Graph, Range
from maml_cuda.plan.strided import Strided

# Operations whose results are some of the given numbers, their signs, or places.
_EXACT = frozenset((
    "view", "reshape", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand",
    "repeat", "slice", "select", "unbind", "split", "split_with_sizes", "flip", "roll", "clone", "alias", "detach",
    "lift_fresh", "contiguous", "cat", "stack", "constant_pad_nd", "unfold", "tril", "triu", "where", "masked_fill",
    "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "amax", "amin", "max", "min", "sign",
    "index", "index_select", "gather", "sort", "topk", "argsort", "one_hot", "zeros_like", "ones_like", "full_like",
    "new_zeros", "new_ones", "new_full", "_to_copy",
))  # fmt: skip
_MIRRORING = frozenset(("neg", "abs"))  # not exact for the smallest number of a dtype, or without signs
_BITWISE = frozenset(("bitwise_and", "bitwise_or", "bitwise_not"))
# Operations that have masks as results, and all of whose results are 0 or 1 if the operands are.
_OF_MASKS = _EXACT | _BITWISE | {
    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "logical_and", "logical_or", "logical_not", "mul", "bernoulli",
    "empty_like", "new_empty", "fill", "copy", "scatter",
}  # fmt: skip
_WIDE = 32  # bits of integers that counts and places do not overflow
_LARGE = 1 << 16  # numbers with which arithmetic on counts and places may leave the exact ones

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
        Unfusable: they may be larger ones, or others than those that fused layers compute.
    """
    name, dtypes = operation.name, {result.dtype for result in operation.results}
    if name in _BITWISE and any(is_integer(operand.dtype) for operand in operation.operands()):
        raise Unfusable(f"arithmetic on the bits of integers is not fused ({name})")
    if torch.bool in dtypes and name not in _OF_MASKS:
        raise Unfusable(f"arithmetic on masks whose result is a mask is not fused ({name})")
    narrow = [dtype for dtype in dtypes if is_integer(dtype) and torch.iinfo(dtype).bits < _WIDE]
    if narrow and name not in _EXACT:
        raise Unfusable(f"arithmetic in {narrow[0]} is not fused ({name})")
    numbers = [n for n in pytree.tree_leaves((operation.args, operation.kwargs)) if isinstance(n, (int, float))]
    if any(map(is_integer, dtypes)) and name not in _EXACT and any(abs(n) >= _LARGE for n in numbers):
        raise Unfusable(f"arithmetic of integers with {max(map(abs, numbers))} is not fused ({name})")
    if not any(id(operand) in of_input and is_integer(operand.dtype) for operand in operation.operands()):
        return False
    if not any(is_integer(result.dtype) for result in operation.results):
        return False
    if name not in _EXACT and not (name in _MIRRORING and dtypes == {torch.int64}):
        raise Unfusable(f"arithmetic on the integers of x is not fused ({name})")
    return True


def check_conversion(operation: Operation, dtype: torch.dtype) -> bool:
    """Whether a conversion to another dtype is `x != 0`; otherwise the values stay as they are.

    Args:
        dtype: the model's.

    Raises:
        Unfusable: it changes them.
    """
    (given, *_), (made,) = operation.operands(), operation.results
    if made.dtype == torch.bool:
        return given.dtype != torch.bool
    if made.dtype.is_complex:
        raise Unfusable(f"a conversion to {made.dtype} is not fused")
    if given.dtype != torch.bool and is_integer(made.dtype) and not _holds(made.dtype, given.dtype, dtype):
        raise Unfusable(f"a conversion of {given.dtype} to {made.dtype} is not fused")
    return False


def _holds(made: torch.dtype, given: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether integers of one dtype hold all numbers of another that are exact in the model's dtype."""
    if not is_integer(given):
        return False
    most, wide, own = most_exact(dtype), torch.iinfo(made), torch.iinfo(given)
    return wide.min <= max(own.min, -most) and min(own.max, most) <= wide.max

"""Numbers that follow from the number of samples n, such as that in `loss.sum() / len(x)`.

In a record they are plain numbers. Where a support set and a query set of different sizes are captured, the same
operation has different numbers in the two records. Such a number is read as a SampleCount, which layers compute for
each set. Both sets are compared with the model (proof.py), so the formula needs to be right for these two sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from maml_cuda.capture.record import Operation, Record
from maml_cuda.plan.graph import SampleCount

_ARITHMETIC = frozenset(("add", "sub", "rsub", "mul", "div", "pow"))
_POWERS = (1.0, -1.0, 0.5, -0.5, 2.0, -2.0)


def counted(records: Sequence[Record]) -> list[Record]:
    """Records of one model on sets of different sizes, with a SampleCount for each number of an arithmetic operation
    that differs among them and follows from n. Without differences, or with others, they are returned as they are."""
    first, last = records[0], records[-1]
    n = first.n, last.n
    if n[0] == n[1] or [o.name for o in first.operations] != [o.name for o in last.operations]:
        return list(records)
    pairs = [_counted(a, b, n) for a, b in zip(first.operations, last.operations, strict=True)]
    changed = zip((first, last), zip(*pairs, strict=True), strict=True)
    return [replace(record, operations=list(operations)) for record, operations in changed]


def _counted(first: Operation, last: Operation, n: tuple[int, int]) -> tuple[Operation, Operation]:
    if first.name not in _ARITHMETIC or len(first.args) != len(last.args):
        return first, last
    args = [_count_of(a, b, n) for a, b in zip(first.args, last.args, strict=True)]
    return tuple(  # type: ignore[return-value]
        replace(o, args=tuple(own if arg is None else arg for own, arg in zip(o.args, args, strict=True)))
        for o in (first, last)
    )


def _count_of(a: Any, b: Any, n: tuple[int, int]) -> SampleCount | None:
    """What is a for n[0] samples and b for n[1] samples, if it is another number for each."""
    if not all(isinstance(number, (int, float)) for number in (a, b)) or a == b or a == 0:
        return None
    for offset, power in product((0, -1), _POWERS):
        if min(n) + offset > 0:
            at = [(size + offset) ** power for size in n]
            if math.isclose(b / a, at[1] / at[0], rel_tol=1e-13):
                return SampleCount(a / at[0], offset, power)
    return None

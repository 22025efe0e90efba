"""Makes a graph smaller: equal layers become one, and maps that follow each other become one pass over memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from maml_cuda.plan.schema import Instruction, Loops, Node, View

MOST_INPUTS = 4  # of a node (csrc/layers/layer.h)
MOST_AXES = 8  # of loops (csrc/layers/loops.h)
MOST_INSTRUCTIONS = 20  # of an expression (csrc/layers/loops.h)
# Layers that depend on nothing but their inputs and fields. The others come in chains that the core looks for.
_ON_ANY_SHAPE = frozenset((
    "parameter", "target", "view", "move", "windows", "map", "reduce", "extreme", "contract", "softmax", "log_softmax",
    "stop", "recurrence", "attention", "depthwise", "gather", "scatter", "sort", "dropout",
))  # fmt: skip

Sizes = tuple[int | None, ...]
Strides = tuple[int, ...]


def simplified(nodes: Sequence[Node], results: Sequence[int]) -> list[Node]:
    """The same graph with fewer nodes. Nodes that are not read any more stay.

    Args:
        results: the values that are wanted.
    """
    return _with_maps_fused(without_repetitions(nodes), results)


def without_repetitions(nodes: Sequence[Node]) -> list[Node]:
    """Readers of a node that repeats an earlier one read that one instead."""
    first: dict[Node, int] = {}
    same = [0]  # for each value, the value that it repeats
    changed = []
    for number, given in enumerate(nodes, start=1):
        node = replace(given, inputs=tuple(same[i] for i in given.inputs))
        key = replace(node, name="")
        changed.append(node)
        same.append(first.setdefault(key, number) if node.kind in _ON_ANY_SHAPE else number)
    return changed


def _with_maps_fused(nodes: Sequence[Node], results: Sequence[int]) -> list[Node]:
    """A map whose only reader is a map over the same elements becomes a part of that one."""
    fused = list(nodes)
    readers = Counter(i for node in alive(fused, results) for i in set(node.inputs))
    readers.update(results)
    for j, node in enumerate(fused):
        if node.kind != "map":
            continue
        for i in sorted(set(node.inputs), reverse=True):
            before = fused[i - 1] if i else None
            if before is not None and before.kind == "map" and readers[i] == 1:
                node = _fused(before, i, node) or node
        for i in set(fused[j].inputs) - set(node.inputs):
            readers[i] -= 1
        fused[j] = node
    return fused


def alive(nodes: Sequence[Node], results: Sequence[int]) -> list[Node]:
    """The nodes that the results depend on."""
    found, pending = set(), list(results)
    while pending:
        number = pending.pop()
        if number and number not in found:
            found.add(number)
            pending.extend(nodes[number - 1].inputs)
    return [nodes[number - 1] for number in sorted(found)]


def _fused(first: Node, number: int, second: Node) -> Node | None:
    """Both maps as one, where `number` is the value of the first; None if they are not over the same elements."""
    (one,), (two,) = first.loops, second.loops
    slots = [k for k, i in enumerate(second.inputs) if i == number]
    if any(not is_in_order(two.sizes, two.inputs[k]) for k in slots):
        return None
    sizes = common_sizes(one.sizes, two.sizes)
    if sizes is None:
        return None
    operands: list[tuple[int, View]] = []

    def place_of(i: int, view: View, of: Sizes) -> int:
        operand = (i, replace(view, strides=split_strides(of, view.strides, sizes)))
        if operand not in operands:
            operands.append(operand)
        return operands.index(operand)

    of_first = [place_of(i, v, one.sizes) for i, v in zip(first.inputs, one.inputs, strict=True)]
    of_second = [
        -1 if k in slots else place_of(i, v, two.sizes)
        for k, (i, v) in enumerate(zip(second.inputs, two.inputs, strict=True))
    ]
    count = len(first.instructions) + len(second.instructions)
    if len(operands) > MOST_INPUTS or count > MOST_INSTRUCTIONS:
        return None
    start = len(operands)
    value = start + len(first.instructions) - 1  # of the first expression
    instructions = [
        *_renumbered(first.instructions, of_first, start),
        *_renumbered(second.instructions, [value if p < 0 else p for p in of_second], value + 1),
    ]
    output = replace(two.output, strides=split_strides(two.sizes, two.output.strides, sizes))
    views = [view for _, view in operands]
    loops = merged_loops(Loops(sizes, tuple(views), output))
    return replace(
        second, inputs=tuple(i for i, _ in operands), loops=(loops,), instructions=tuple(instructions)
    )  # fmt: skip


def _renumbered(instructions: Sequence[Instruction], operands: Sequence[int], start: int) -> list[Instruction]:
    """Instructions whose operands and results have other numbers; the first result is `start`."""
    numbers = [*operands, *range(start, start + len(instructions))]
    return [replace(i, arguments=tuple(numbers[a] for a in i.arguments)) for i in instructions]


def is_in_order(sizes: Sizes, view: View) -> bool:
    """Whether the loops read each element of an operand once, in the order in which it is in memory."""
    stride = 1
    for size, given in zip(reversed(sizes), reversed(view.strides), strict=True):
        if given != (view.size if size is None else stride):
            return False
        stride *= size or 1
    return view.offset == 0 and stride == view.size and view.samples == (None in sizes)


def common_sizes(one: Sizes, two: Sizes) -> Sizes | None:
    """The axes of both, cut into common parts; None if they have none."""
    if (one[:1] == (None,)) != (two[:1] == (None,)):
        return None
    left, right = ([s for s in reversed(sizes) if s is not None] for sizes in (one, two))
    parts: list[int] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        small, large = min(a, b), max(a, b)
        if large % small:
            return None
        parts.append(small)
        if large > small:
            (left if a > b else right).insert(0, large // small)
    if math.prod(left) != 1 or math.prod(right) != 1:
        return None
    return (*one[: 1 if one[:1] == (None,) else 0], *reversed(parts))


def split_strides(sizes: Sizes, strides: Strides, parts: Sizes) -> Strides:
    """The strides for the axes cut into parts."""
    result: list[int] = []
    axes = list(zip(reversed(sizes), reversed(strides), strict=True))
    for part in reversed(parts):
        while axes[0][0] == 1 and part != 1:
            axes.pop(0)
        size, stride = axes.pop(0)
        result.append(stride)
        if size is not None and part is not None and size > part:
            axes.insert(0, (size // part, stride * part))
    return tuple(reversed(result))


def merged_loops(loops: Loops, apart: int = 0) -> Loops:
    """The same loops over as few axes as possible; the last `apart` axes stay as they are."""
    views = [*loops.inputs, loops.output]
    kept: list[tuple[int | None, Strides]] = []
    for d, size in enumerate(loops.sizes):
        strides = tuple(view.strides[d] for view in views)
        stays = d >= len(loops.sizes) - apart
        if size == 1 and not stays:
            continue
        if kept and kept[-1][0] and size and not stays:
            outer, before = kept[-1]
            if outer is not None and all(o == i * size for o, i in zip(before, strides, strict=True)):
                kept[-1] = (outer * size, strides)
                continue
        kept.append((size, strides))
    kept = kept or [(1, (0,) * len(views))]
    changed = [replace(view, strides=tuple(s[k] for _, s in kept)) for k, view in enumerate(views)]
    return Loops(tuple(size for size, _ in kept), tuple(changed[:-1]), changed[-1])

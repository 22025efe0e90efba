"""Finds attention in a graph, softmax(scale q k' + bias) v, and makes it one layer that stores none of the matrices in
between (csrc/layers/attention.h).

What is looked for, where no other node reads the values in between:

    contract q, k  ->  [map: times a number, plus a bias, -inf where a mask says so]  ->  softmax  ->  contract with v

around the softmax also the two maps that make a row of nothing but -inf zero (torch's safe softmax). The scores, what
the map makes of them and the weights have their elements in one order in memory. So the axes of both products are told
apart by the strides that they have there: along the softmax are the keys; the axis before them are the queries, if
neither k nor v has it; the others are a batch of matrices. The result is written where a `move`, which joins the heads,
would copy it to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from maml_cuda.plan.schema import Instruction, Loops, Node, View
from maml_cuda.plan.simplify import (
    MOST_AXES,
    MOST_INSTRUCTIONS,
    Sizes,
    Strides,
    alive,
    common_sizes,
    is_in_order,
    merged_loops,
    split_strides,
)

# The number that all elements of a value are, if it is a constant; otherwise None.
NumberOf = Callable[[int], float | None]


def with_attention(nodes: Sequence[Node], results: Sequence[int], number_of: NumberOf) -> list[Node]:
    """The same graph with attention as one layer. Nodes that are not read any more stay.

    Args:
        results: the values that are wanted.
    """
    graph = _Graph(list(nodes), results, number_of)
    for value, node in enumerate(nodes, start=1):
        if node.kind == "contract":
            graph.replace_at(value)
        elif node.kind == "move":
            graph.write_at(value)
    return graph.nodes


@dataclass(frozen=True)
class _Nest:
    """Loops over axes that are sorted as some values have them in memory, with the strides of operands."""

    sizes: Sizes
    strides: dict[str, Strides]

    def joined(self, other: _Nest) -> _Nest | None:
        """The axes of both, cut into common parts; None if they have none."""
        sizes = common_sizes(self.sizes, other.sizes)
        if sizes is None:
            return None
        strides = {
            name: split_strides(nest.sizes, given, sizes)
            for nest in (self, other)
            for name, given in nest.strides.items()
        }
        return _Nest(sizes, strides)

    def has(self, axis: int, *names: str) -> bool:
        """Whether one of these operands has an axis."""
        return any(name in self.strides and self.strides[name][axis] for name in names)

    def last(self) -> _Nest:
        return _Nest(self.sizes[-1:], {name: strides[-1:] for name, strides in self.strides.items()})

    def without_last(self) -> _Nest:
        return _Nest(self.sizes[:-1], {name: strides[:-1] for name, strides in self.strides.items()})

    def swapped(self) -> _Nest:
        """With the strides of q and k exchanged."""
        return _Nest(self.sizes, {**self.strides, "q": self.strides["k"], "k": self.strides["q"]})

    def with_last_merged(self) -> _Nest | None:
        """The last two axes as one; None if an operand has them as two."""
        *_, outer, inner = self.sizes
        if outer is None or inner is None:
            return None
        if any(strides[-2] != strides[-1] * inner for strides in self.strides.values()):
            return None
        strides = {name: (*strides[:-2], strides[-1]) for name, strides in self.strides.items()}
        return _Nest((*self.sizes[:-2], outer * inner), strides)


@dataclass(frozen=True)
class _Scores:
    """What the softmax reads: scale times a product, plus a bias.

    Attributes:
        product: the number of the product.
        sizes, bias: the number of the bias, and its view in loops over the scores; None: there is none.
        writes: the node that writes this number, if there is none yet.
    """

    product: int
    scale: float = 1.0
    sizes: Sizes = ()
    bias: tuple[int, View] | None = None
    writes: Node | None = None


class _Graph:
    def __init__(self, nodes: list[Node], results: Sequence[int], number_of: NumberOf) -> None:
        self.nodes = nodes
        self._number_of = number_of
        self._readers = Counter(i for node in alive(nodes, results) for i in node.inputs)
        self._readers.update(results)

    def replace_at(self, value: int) -> None:
        """Makes the contraction that writes a value an attention, if it is the end of one."""
        last = self.nodes[value - 1]
        for place, weights in enumerate(last.inputs):
            softmax = self._node(weights, "softmax") or self._safe_softmax(weights)
            if softmax is None:
                continue
            safe = softmax is not self.nodes[weights - 1]
            scores = self._scores(softmax.inputs[0], readers=2 if safe else 1)
            found = None if scores is None else self._attention(last, place, softmax, scores, safe)
            if scores is None or found is None:
                continue
            self.nodes[value - 1] = found
            if scores.writes is not None and scores.bias is not None:
                self.nodes[scores.bias[0] - 1] = scores.writes
            return

    def write_at(self, value: int) -> None:
        """Makes the move that writes a value an attention, if it only brings the result of one into another order."""
        node = self.nodes[value - 1]
        attention = self._node(node.inputs[0], "attention") if len(node.inputs) == 1 else None
        if attention is None:
            return
        (loops,), (copy,) = attention.loops, node.loops
        strides = list(loops.output.strides)
        axes = sorted((d for d, stride in enumerate(strides) if stride), key=lambda d: -strides[d])
        sizes = tuple(loops.sizes[d] for d in axes)
        moved = _in_memory(copy.sizes, copy.inputs[0], {"y": copy.output})
        if moved is None or _in_memory(copy.sizes, copy.output, {}) is None or copy.output.size != loops.output.size:
            return
        if common_sizes(moved.sizes, sizes) == sizes:
            for d, stride in zip(axes, split_strides(moved.sizes, moved.strides["y"], sizes), strict=True):
                strides[d] = stride
            output = replace(copy.output, strides=tuple(strides))
            self.nodes[value - 1] = replace(attention, loops=(replace(loops, output=output),))

    def _node(self, value: int, kind: str, readers: int = 1) -> Node | None:
        """The node that writes a value, if it is of this kind and so many operands of others read it."""
        node = self.nodes[value - 1] if value else None
        return node if node is not None and node.kind == kind and self._readers[value] == readers else None

    def _safe_softmax(self, weights: int) -> Node | None:
        """The softmax of x, where these weights are where(e, 0, softmax(where(e, 0, x))) with e = (amax(x) == -inf)."""
        outside = self._zero_where(weights)
        softmax = self._node(outside[1], "softmax") if outside else None
        inside = self._zero_where(softmax.inputs[0]) if softmax else None
        if outside is None or softmax is None or inside is None or inside[0] != outside[0]:
            return None
        empty, scores = inside
        test = self._node(empty, "map", readers=2)
        if test is None or [i.name for i in test.instructions] != ["eq"] or len(test.inputs) != 2:
            return None
        largest = self._node(test.inputs[0], "extreme")
        if largest is None or self._number_of(test.inputs[1]) != -math.inf or largest.reduction != "amax":
            return None
        (of_largest,), (of_softmax,) = largest.loops, softmax.loops
        along = [s for s, stride in zip(of_largest.sizes, of_largest.output.strides, strict=True) if stride == 0]
        in_order = is_in_order(of_largest.sizes, of_largest.inputs[0]) and of_largest.output.strides[-1] == 0
        if largest.inputs != (scores,) or not in_order or along != [of_softmax.sizes[-1]]:
            return None
        return replace(softmax, inputs=(scores,))

    def _zero_where(self, value: int) -> tuple[int, int] | None:
        """(e, x), where a value is where(e, 0, x) and e is the same along the last axis."""
        node = self._node(value, "map")
        if node is None or [(i.name, i.arguments) for i in node.instructions] != [("where", (0, 1, 2))]:
            return None
        (loops,) = node.loops
        empty, zero, x = node.inputs
        same = is_in_order(loops.sizes[:-1], replace(loops.inputs[0], strides=loops.inputs[0].strides[:-1]))
        if self._number_of(zero) != 0 or not same or loops.inputs[0].strides[-1] != 0:
            return None
        return (empty, x) if is_in_order(loops.sizes, loops.inputs[2]) else None

    def _scores(self, value: int, readers: int) -> _Scores | None:
        """A value as scale times a product, plus a bias."""
        if self._node(value, "contract", readers) is not None:
            return _Scores(value)
        node = self._node(value, "map", readers)
        if node is None:
            return None
        (loops,) = node.loops
        for place, product in enumerate(node.inputs):
            is_product = self._node(product, "contract") is not None
            found = _Linear(node, place, self._number_of).read() if is_product else None
            if found is None or not is_in_order(loops.sizes, loops.inputs[place]):
                continue
            scale, bias, instructions = found
            if bias is None:
                return _Scores(product, scale)
            if bias < len(node.inputs):
                return _Scores(product, scale, loops.sizes, (node.inputs[bias], loops.inputs[bias]))
            if len(instructions) > MOST_INSTRUCTIONS or bias != len(node.inputs) + len(instructions) - 1:
                return None
            writes, view = _map_of_others(node, place, instructions)
            return _Scores(product, scale, loops.sizes, (value, view), writes)
        return None

    def _attention(self, last: Node, place: int, softmax: Node, scores: _Scores, safe: bool) -> Node | None:
        """The layer that computes what the contraction `last` does, whose operand `place` are the weights."""
        first = self.nodes[scores.product - 1]
        (one,), (two,), (middle,) = first.loops, last.loops, softmax.loops
        if middle.inputs[0].strides != middle.output.strides or middle.output.strides[-1] != 1:
            return None
        of_scores = _divided(one.sizes, one.output, {"q": one.inputs[0], "k": one.inputs[1]})
        of_weights = _divided(two.sizes, two.inputs[place], {"v": two.inputs[1 - place], "y": two.output})
        if of_scores is None or of_weights is None:
            return None
        (nest, depth), (other, width) = of_scores, of_weights
        both = nest.joined(other)
        if both is not None and scores.bias is not None:
            both = both.joined(_Nest(scores.sizes, {"bias": scores.bias[1].strides}))
        of_keys = both and _with_last_axis(both, middle.sizes[-1])
        if of_keys is None:
            return None
        nest = of_keys
        values = {"q": first.inputs[0], "k": first.inputs[1], "v": last.inputs[1 - place]}
        views = {"q": one.inputs[0], "k": one.inputs[1], "v": two.inputs[1 - place], "y": two.output}
        if nest.has(-1, "q"):  # the product is k q'
            nest, depth = nest.swapped(), depth.swapped()
            values["q"], values["k"], views["q"], views["k"] = values["k"], values["q"], views["k"], views["q"]
        if scores.bias is not None:
            values["bias"], views["bias"] = scores.bias
        loops = _loops(nest, depth, width, views)
        if loops is None:
            return None
        constants = (scores.scale, float(safe))
        return replace(last, kind="attention", inputs=tuple(values.values()), loops=(loops,), constants=constants)


def _in_memory(sizes: Sizes, view: View, operands: dict[str, View]) -> _Nest | None:
    """The axes that a dense value has, sorted as it has them in memory; None if it is not dense."""
    has = [d for d, size in enumerate(sizes) if size != 1 and view.strides[d]]
    nest = _chosen(sizes, sorted(has, key=lambda d: -view.strides[d]), {**operands, "": view})
    strides = nest.strides.pop("")
    return nest if is_in_order(nest.sizes, replace(view, strides=strides)) else None


def _chosen(sizes: Sizes, axes: Sequence[int], operands: dict[str, View]) -> _Nest:
    return _Nest(
        tuple(sizes[d] for d in axes), {name: tuple(v.strides[d] for d in axes) for name, v in operands.items()}
    )


def _divided(sizes: Sizes, view: View, operands: dict[str, View]) -> tuple[_Nest, _Nest] | None:
    """The axes that a dense value has, sorted as it has them in memory, and one axis for all the others; None if the
    value is not dense or the others are not one axis."""
    nest = _in_memory(sizes, view, operands)
    rest = _chosen(sizes, [d for d, size in enumerate(sizes) if size != 1 and not view.strides[d]], operands)
    if not rest.sizes:
        rest = _Nest((1,), dict.fromkeys(operands, (0,)))
    one = _with_last_axis(rest, math.prod(size or 0 for size in rest.sizes))
    return None if nest is None or one is None else (nest, one)


def _with_last_axis(nest: _Nest, size: int | None) -> _Nest | None:
    """The nest whose last axis has this size; None if it has no such axis."""
    found: _Nest | None = nest
    while found is not None and found.sizes and found.sizes[-1] is not None and found.sizes[-1] != size:
        found = found.with_last_merged() if len(found.sizes) > 1 else None
    return found if found is not None and found.sizes and found.sizes[-1] == size else None


def _loops(nest: _Nest, depth: _Nest, width: _Nest, views: dict[str, View]) -> Loops | None:
    """The loops over a batch, queries, keys, depth and width; None if an operand has other axes than its own."""
    keys, batch = nest.last(), nest.without_last()
    queries = _Nest((1,), dict.fromkeys(nest.strides, (0,)))
    if batch.sizes and batch.sizes[-1] is not None and not batch.has(-1, "k", "v"):
        while len(batch.sizes) > 1 and not batch.has(-2, "k", "v") and (merged := batch.with_last_merged()):
            batch = merged
        queries, batch = batch.last(), batch.without_last()
    has_all = all(batch.has(d, "y") for d in range(len(batch.sizes))) and (queries.sizes == (1,) or queries.has(0, "y"))
    if keys.has(0, "q", "y") or not has_all or (width.sizes != (1,) and not width.has(0, "y")):
        return None
    own = (queries, keys, depth, width)
    strides = {
        name: (*batch.strides[name], *(axis.strides.get(name, (0,))[0] for axis in own)) for name in nest.strides
    }
    sizes = (*batch.sizes, *(axis.sizes[0] for axis in own))
    seen = {name: replace(view, strides=strides[name]) for name, view in views.items()}
    y = seen.pop("y")
    loops = merged_loops(Loops(sizes, tuple(seen.values()), y), apart=len(own))
    return loops if len(loops.sizes) <= MOST_AXES else None


class _Linear:
    """The expression of a map as scale times one of its operands, plus a bias of the others.

    Attributes:
        place: of that operand.
        instructions: that compute the bias from the operands of the map.
    """

    def __init__(self, node: Node, place: int, number_of: NumberOf) -> None:
        self._node, self._place, self._number_of = node, place, number_of
        self.instructions: list[Instruction] = []

    def read(self) -> tuple[float, int | None, list[Instruction]] | None:
        """The scale, and the number of the bias among operands and results of instructions; None if it is not so."""
        node, place = self._node, self._place
        # For each operand and result: its factor of the operand, and the number of the rest, or None for 0.
        terms: list[tuple[float, int | None]] = [
            (1.0, None) if i == place else (0.0, i) for i in range(len(node.inputs))
        ]
        for instruction in node.instructions:
            term = self._term(instruction, [terms[a] for a in instruction.arguments])
            if term is None:
                return None
            terms.append(term)
        scale, bias = terms[-1]
        return (scale, bias, self.instructions) if scale != 0 else None

    def _term(self, step: Instruction, given: list[tuple[float, int | None]]) -> tuple[float, int | None] | None:
        """The result of an instruction; None if it is not linear in the operand."""
        linear = [scale != 0 for scale, _ in given]
        if not any(linear):
            arguments = [rest for _, rest in given]
            assert None not in arguments
            return 0.0, self._write(step.name, arguments, step.constants)
        scale, rest = next(term for term in given if term[0] != 0)
        factor: float | None
        if step.name == "affine" and step.constants[1] == 0:
            factor = step.constants[0]
        elif step.name == "mul" and sum(linear) == 1:
            factor = self._number_at(given[linear.index(False)])
        elif step.name == "div" and linear == [True, False]:
            divisor = self._number_at(given[1])
            factor = 1 / divisor if divisor else None
        elif step.name == "add" and sum(linear) == 1:
            (_, other) = given[linear.index(False)]
            return scale, other if rest is None else self._write("add", [rest, other])
        elif step.name == "where" and sum(linear) == 1 and not linear[0]:
            (_, mask), (_, other) = given[0], given[3 - linear.index(True)]
            if self._number_at((0.0, other)) != -math.inf:
                return None
            kept = self._write("affine", [mask], (0.0, 0.0)) if rest is None else rest
            chosen = [mask, kept, other] if linear[1] else [mask, other, kept]
            return scale, self._write("where", chosen)
        else:
            return None
        if factor is None or factor == 0:
            return None
        return scale * factor, None if rest is None else self._write("affine", [rest], (factor, 0.0))

    def _number_at(self, term: tuple[float, int | None]) -> float | None:
        """The number that an operand is everywhere."""
        _, at = term
        return self._number_of(self._node.inputs[at]) if at is not None and at < len(self._node.inputs) else None

    def _write(self, name: str, arguments: Sequence[int | None], constants: tuple[float, ...] = ()) -> int:
        self.instructions.append(Instruction(name, tuple(a for a in arguments if a is not None), constants))
        return len(self._node.inputs) + len(self.instructions) - 1


def _map_of_others(node: Node, place: int, instructions: Sequence[Instruction]) -> tuple[Node, View]:
    """The map that computes these instructions of a map's operands but one; and its result as a view in the loops of
    the given map. An axis along which no operand changes is not stored."""
    (loops,) = node.loops
    count = len(node.inputs)
    others = [i for i in range(count) if i != place]
    numbers = {old: new for new, old in enumerate(others)} | {
        count + i: count - 1 + i for i in range(len(instructions))
    }
    views = [loops.inputs[i] for i in others]
    kept = [any(view.strides[d] for view in views) for d in range(len(loops.sizes))]
    strides, size = [0] * len(kept), 1
    for d, given in reversed(list(enumerate(loops.sizes))):
        if kept[d]:
            strides[d] = size
            size *= given or 1
    samples = loops.sizes[0] is None and kept[0]
    result = View(size, samples, 0, tuple(strides))
    own = [d for d in range(len(kept)) if kept[d]]

    def part(view: View) -> View:
        return replace(view, strides=tuple(view.strides[d] for d in own))

    return replace(
        node,
        inputs=tuple(node.inputs[i] for i in others),
        loops=(merged_loops(Loops(tuple(loops.sizes[d] for d in own), tuple(map(part, views)), part(result))),),
        instructions=tuple(replace(i, arguments=tuple(numbers[a] for a in i.arguments)) for i in instructions),
    ), result

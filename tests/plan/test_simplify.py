"""Graphs with equal layers as one and maps fused: what they compute, node by node, is what the graph did before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from maml_cuda.plan.graph import Value
from maml_cuda.plan.loops import LoopWriter
from maml_cuda.plan.schema import Instruction, Loops, Node, View
from maml_cuda.plan.simplify import (
    MOST_INPUTS,
    MOST_INSTRUCTIONS,
    merged_loops,
    simplified,
    without_repetitions,
)
from maml_cuda.plan.strided import Atom, Strided

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "affine": lambda x, factor, summand: factor * x + summand,
    "sin": torch.sin,
    "exp": torch.exp,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": lambda mask, x, y: torch.where(mask != 0, x, y),
}


def computed(nodes: Sequence[Node], x: Tensor, tensors: Sequence[Tensor], n: int) -> list[Tensor]:
    """The memory of each value of a graph of parameters and maps, loop by loop."""
    values = [x.flatten()]
    for node in nodes:
        if node.kind == "parameter":
            (index,) = node.parameters
            values.append(tensors[index].flatten())
            continue
        assert node.kind == "map"
        (loops,) = node.loops
        at = [places(loops.sizes, view, n) for view in (*loops.inputs, loops.output)]
        results = [values[i][a] for i, a in zip(node.inputs, at[:-1], strict=True)]
        for name, arguments, constants in ((i.name, i.arguments, i.constants) for i in node.instructions):
            results.append(FUNCTIONS[name](*(results[a] for a in arguments), *constants))
        y = torch.full(((n if loops.output.samples else 1) * loops.output.size,), math.nan, dtype=torch.float64)
        y[at[-1]] = results[-1]
        assert not y.isnan().any()  # each element is written
        values.append(y)
    return values


def places(sizes: Sequence[int | None], view: View, n: int) -> Tensor:
    """The addresses that loops come to, in order."""
    at = torch.tensor(view.offset)
    for size, stride in zip(sizes, view.strides, strict=True):
        at = at[..., None] + torch.arange(n if size is None else size) * stride
    return at.flatten()


class Written(LoopWriter):
    """Writes maps of the input x, [n, 4, 6], and of parameters."""

    def __init__(self, n: int = 3) -> None:
        super().__init__(n, torch.float64)
        self.results = [()]
        self.x = self.strided(Value(0, (n, 4, 6), (4, 6), False, False))
        self.tensors: list[Tensor] = []

    def parameter(self, *shape: int) -> Strided:
        self.tensors.append(torch.randn(shape).double())
        size = math.prod(shape)
        number = self.emit_on_any("parameter", (), parameters=(len(self.tensors) - 1,), image=(size, 1, 1))
        return Strided(number, size, False, 0, ((Atom(size, 1),),), self.n, True).view(shape)

    def check(self, last: Strided, maps: int | None = None) -> list[Node]:
        """The simplified graph computes the same, with this many maps that its last node depends on."""
        nodes = self.graph.nodes[: last.number]
        fewer = simplified(nodes, [len(nodes)])
        x = torch.randn(self.n * 24).double()
        before, after = (computed(graph, x, self.tensors, self.n)[-1] for graph in (nodes, fewer))
        torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-12)
        alive, pending = set(), [len(fewer)]
        while pending:
            if (number := pending.pop()) and number not in alive:
                alive.add(number)
                pending.extend(fewer[number - 1].inputs)
        assert maps in (None, sum(fewer[number - 1].kind == "map" for number in alive))
        return fewer


def chain(w: Written) -> Strided:
    return w.map("sin", w.map("affine", w.map("exp", w.x), constants=(0.3, -1.0)))


def of_two(w: Written) -> Strided:
    return w.map("mul", w.map("sin", w.x), w.map("exp", w.map("add", w.x, w.parameter(6))))


def read_in_another_order(w: Written) -> Strided:
    return w.map("add", w.x.view((3, 6, 4)), w.map("sin", w.x).permute((0, 2, 1)))


def read_in_the_order_of_memory(w: Written) -> Strided:
    return w.map("add", w.map("sin", w.x).permute((0, 2, 1)), w.parameter(6, 4))


def read_in_another_shape(w: Written) -> Strided:
    return w.map("add", w.map("sin", w.x).view((3, 24)), w.parameter(24))


def read_in_smaller_parts(w: Written) -> Strided:
    return w.map("add", w.map("mul", w.x, w.parameter(4, 1)).view((3, 2, 2, 6)), w.parameter(2, 1, 6))


def of_another_order(w: Written) -> Strided:
    return w.map("mul", w.map("sin", w.x.permute((0, 2, 1))), w.parameter(6, 4))


def broadcast(w: Written) -> Strided:
    return w.map("mul", w.x, w.map("exp", w.parameter(6)))


def a_part(w: Written) -> Strided:
    return w.map("exp", w.map("sin", w.x).slice(1, 1, 2))


def read_twice(w: Written) -> Strided:
    h = w.map("sin", w.x)
    return w.map("mul", h, h)


def read_by_two(w: Written) -> Strided:
    h = w.map("sin", w.x)
    return w.map("sub", w.map("exp", h), w.map("affine", h, constants=(2.0, 0.0)))


def the_same_twice(w: Written) -> Strided:
    return w.map("mul", w.map("sin", w.x), w.map("sin", w.x))


def of_parameters(w: Written) -> Strided:
    return w.map("mul", w.map("exp", w.parameter(4, 6)), w.parameter(4, 1))


def of_three(w: Written) -> Strided:
    return w.map("exp", w.map("where", w.map("maximum", w.x, w.parameter(6)), w.x, w.parameter(4, 1)))


def merged_samples(w: Written) -> Strided:
    flat = w.map("sin", w.x.view((12, 6)))
    return w.map("mul", flat.view((3, 4, 6)), w.parameter(4, 6))


def once_more(w: Written) -> Strided:
    """The second reader of a value is fused first."""
    h = w.map("exp", w.x)
    return w.map("add", w.map("sin", h), w.map("mul", h, w.parameter(6)))


@pytest.mark.parametrize(
    ("write", "maps"),
    [
        (chain, 1), (of_two, 1), (read_in_another_order, 2), (read_in_the_order_of_memory, 1),
        (read_in_another_shape, 1), (read_in_smaller_parts, 1),
        (of_another_order, 1), (broadcast, 2), (a_part, 2), (read_twice, 1), (read_by_two, 2), (the_same_twice, 1),
        (of_parameters, 1), (of_three, 1), (merged_samples, 1), (once_more, 2),
    ],
)  # fmt: skip
def test_maps_that_follow_each_other_are_one(write: Callable[[Written], Strided], maps: int) -> None:
    w = Written()
    w.check(write(w), maps)


def test_as_many_inputs_and_instructions_as_a_node_has() -> None:
    w = Written()
    h = w.x
    for _ in range(MOST_INPUTS + 1):
        h = w.map("add", h, w.parameter(4, 6))
    assert max(len(node.inputs) for node in w.check(h, 2)) == MOST_INPUTS
    w = Written()
    h = w.x
    for _ in range(MOST_INSTRUCTIONS + 1):
        h = w.map("sin", h)
    assert max(len(node.instructions) for node in w.check(h, 2)) == MOST_INSTRUCTIONS


def test_equal_layers_are_one() -> None:
    """Their names, which are those of calls, may differ; constants and views may not."""
    w = Written()
    w.call = "first"
    a = w.map("affine", w.x, constants=(2.0, 0.0))
    w.call = "second"
    same, other = (w.map("affine", w.x, constants=(c, 0.0)) for c in (2.0, 3.0))
    part, next_part = (w.map("sin", w.x.slice(1, start, 2)) for start in (0, 2))
    y = [w.map("sub", *pair).number for pair in ((a, same), (a, other), (part, next_part))]
    nodes = without_repetitions(w.graph.nodes)
    sources = [set(nodes[number - 1].inputs) for number in y]
    assert sources == [{a.number}, {a.number, other.number}, {part.number, next_part.number}]


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_of_maps(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    w = Written(draw.choice([1, 3, 4]))
    values = [w.x, w.parameter(4, 6), w.parameter(6), w.parameter(4, 1), w.parameter(6, 4).permute((1, 0))]
    for _ in range(12):
        h = draw.choice([*values[-4:], w.x])
        if draw.random() < 0.4:
            h = w.map("affine", w.map(draw.choice(["sin", "exp"]), w.map("sin", h)), constants=(draw.random(), 0.5))
        else:
            h = w.map(draw.choice(["add", "sub", "mul", "maximum"]), h, draw.choice(values))
        if len(h.axes) == 3 and draw.random() < 0.2:
            h = w.map("sin", h.permute((0, 2, 1))).permute((0, 2, 1))
        values.append(h)
    w.check(values[-1])


@pytest.mark.parametrize(
    ("sizes", "strides", "apart"),
    [
        ((None, 4, 6), (24, 6, 1), 0),
        ((None, 4, 6), (24, 6, 1), 1),
        ((None, 4, 6), (24, 6, 1), 2),
        ((None, 4, 6), (24, 1, 4), 0),
        ((None, 1, 4, 1, 6), (24, 0, 6, 5, 1), 0),
        ((None, 4, 6, 1), (24, 6, 1, 0), 1),
        ((2, 2, 6), (12, 6, 1), 0),
        ((2, 2, 6), (12, 6, 1), 2),
        ((4, 6), (0, 0), 0),
        ((1, 1), (7, 3), 0),
        ((), (), 0),
    ],
)
def test_loops_over_as_few_axes_as_possible(sizes, strides, apart) -> None:
    dense = [math.prod(s or 1 for s in sizes[d + 1 :]) for d in range(len(sizes))]
    views = [View(24, None in sizes, 0, tuple(s)) for s in (strides, dense)]
    given = Loops(sizes, (views[0],), views[1])
    merged = merged_loops(given, apart)
    for before, after in ((given.inputs[0], merged.inputs[0]), (given.output, merged.output)):
        assert places(sizes, before, 3).tolist() == places(merged.sizes, after, 3).tolist()
    assert merged.sizes[len(merged.sizes) - apart :] == sizes[len(sizes) - apart :]


def test_the_axes_of_a_dense_map_are_one() -> None:
    w = Written()
    y = w.map("sin", w.x)
    (loops,) = w.graph.nodes[y.number - 1].loops
    assert loops.sizes == (None, 24)
    assert loops.inputs == (loops.output,) == (View(24, True, 0, (24, 1)),)
    assert w.graph.nodes[y.number - 1].instructions == (Instruction("sin", (0,), ()),)

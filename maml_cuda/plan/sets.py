"""The tensors of a support or query set: the inputs of the model, and the target of a computed loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.capture.record import Operand
from maml_cuda.plan.graph import Known, Labels, Value
from maml_cuda.plan.loops import LoopWriter
from maml_cuda.plan.strided import Atom, Strided, merged


class Sets(LoopWriter):
    """Writes layers over loops, and gives the tensors of a set as views of values.

    Attributes:
        whole_sets: whether a whole set is one sample, so that the axis of samples is one like any other.
        labels: leaves of the target that hold class labels.
    """

    whole_sets = False

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__(n, dtype)
        self.labels: list[Labels] = []
        self._target = 0  # the number of the value that holds the target
        self._columns: dict[int, int] = {}  # where a leaf of the target begins -> its number

    def inputs(self, given: Sequence[Operand]) -> list[Known]:
        """The inputs of the model, each [n, ...]. Several stand beside each other in value 0."""
        if len(given) == 1 and not self.whole_sets:
            (shape,) = (x.shape for x in given)
            return [Value(0, shape, shape[1:], False, False)]
        return [*self._beside(0, [(x.name, x.shape) for x in given])]

    def targets(self, shapes: Sequence[tuple[int, ...]]) -> list[Strided]:
        """The leaves of the target of a computed loss, each [n, ...]. They stand beside each other in one value."""
        self.graph.target = total = sum(math.prod(shape if self.whole_sets else shape[1:]) for shape in shapes)
        number = self.emit_on_any("target", (), image=(total, 1, 1))
        leaves = self._beside(number, [("a part of the target", shape) for shape in shapes])
        self._target = leaves[0].number
        self._columns = {leaf.offset: number for number, leaf in enumerate(leaves)}
        return leaves

    def _beside(self, number: int, parts: Sequence[tuple[str, tuple[int, ...]]]) -> list[Strided]:
        """The parts [n, ...] of a value in which they stand beside each other.

        Args:
            parts: what each is, and its shape.
        """
        if self.whole_sets:
            return self._beside_in_the_task(number, [shape for _, shape in parts])
        for what, shape in parts:
            if shape[:1] != (self.n,):
                raise Unfusable(f"{what} has shape {list(shape)}, whose first axis does not count the {self.n} samples")
        widths = [math.prod(shape[1:]) for _, shape in parts]
        total, views = sum(widths), []
        for i, (_, shape) in enumerate(parts):
            axes = [(Atom(None, total),), *((Atom(s, math.prod(shape[d + 2 :])),) for d, s in enumerate(shape[1:]))]
            views.append(Strided(number, total, True, sum(widths[:i]), tuple(map(merged, axes)), self.n, False))
        return views

    def _beside_in_the_task(self, number: int, shapes: Sequence[tuple[int, ...]]) -> list[Strided]:
        """The same of a whole set: the value of its one sample is one of the task, the sum over that sample."""
        total = sum(map(math.prod, shapes))
        of_set = Strided(number, total, True, 0, ((Atom(None, total),), (Atom(total, 1),)), 1, False)
        of_task = self.reduce("reduce", "sum", of_set, [0], keepdim=False)
        views, start = [], 0
        for shape in shapes:
            axes = ((Atom(s, math.prod(shape[d + 1 :])),) for d, s in enumerate(shape))
            views.append(of_task.with_axes(axes, start))
            start += math.prod(shape)
        return views

    def leaf_of(self, x: Strided) -> int | None:
        """The number of the leaf of the target that this is a view of."""
        return self._columns.get(x.offset) if self._target and x.number == self._target else None

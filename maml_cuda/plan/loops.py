"""Writes layers over loops (csrc/layers/loops.h), whose operands are views of values of any shape."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Constant, Held, LogSumExp, SampleCount, Value, Writer, text_of
from maml_cuda.plan.masks import Drawn, dropped
from maml_cuda.plan.schema import Instruction, Loops, View
from maml_cuda.plan.simplify import MOST_INPUTS, merged_loops
from maml_cuda.plan.strided import Atom, Axis, NotAView, Step, Strided, aligned, merged


class LoopWriter(Writer):
    """Writes layers over loops.

    Attributes:
        dtype: of the model's input.
    """

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__(n)
        self.dtype = dtype
        self._as_values: dict[Any, int] = {}  # a tensor of the model -> the number of its value

    # -- operands -----------------------------------------------------------------------------------------------

    def strided(self, x: Any) -> Strided:
        """An operand as a view of a value."""
        if isinstance(x, Strided):
            return x
        if isinstance(x, Value):
            return self._of_image(x)
        if isinstance(x, Held):
            return self._of_parameter(x)
        if isinstance(x, Drawn):
            return dropped(self, self.literal(torch.ones((), dtype=torch.float64)), x)
        if isinstance(x, LogSumExp):
            return self.log_of_sum(self.strided(x.of), [len(x.of.shape) - 1], keepdim=True)
        if isinstance(x, (bool, int, float)):
            return self.literal(torch.tensor(float(x), dtype=torch.float64))
        if isinstance(x, Constant) and x.make is not None:
            return self.literal(x.make())
        if isinstance(x, SampleCount):
            return self._of_count(x)
        raise Unfusable(f"it reads {text_of(x)}")

    def _of_image(self, x: Value) -> Strided:
        """The axes [n, channels, ...] of an image that is [n, ..., channels] in memory."""
        if x.padding is not None:
            (top, bottom), (left, right) = x.padding
            inside = self.strided(replace(x, padding=None))
            added = [(0, 0)] * (len(x.shape) - 2) + [(top, bottom), (left, right)]
            return self.padded(inside, added[-len(x.shape) :])
        channels, *spatial = x.sample or (1,)
        order = [*spatial, channels] if x.channels_last else [channels, *spatial]
        strides = [math.prod(order[d + 1 :]) for d in range(len(order))]
        if x.channels_last:
            strides = [strides[-1], *strides[:-1]]
        size = math.prod(order)
        axes = [(Atom(None, size),), *((Atom(s, stride),) for s, stride in zip(x.sample, strides, strict=False))]
        given = Strided(x.number, size, True, 0, tuple(map(merged, axes)), self.n, x.learned)
        seen = self.seen_as(given, x.shape)
        return self.along("log_softmax", seen, len(x.shape) - 1) if x.log_softmax else seen

    def weight(self, x: Any, rows: int, taps: int) -> Strided:
        """A weight [rows, columns, *taps] as a view of a value. A tensor of the model is kept in the order [taps,
        columns, rows], unless another layer has it in another one."""
        return self._of_parameter(x, rows, taps) if isinstance(x, Held) else self.strided(x)

    def _of_parameter(self, x: Held, rows: int = 1, taps: int = 1) -> Strided:
        """A parameter, a buffer or a view of one as a value of the task."""
        if x.slot:
            raise Unfusable(f"it reads {x}")
        shape = x.shape[1:] if x.rows else x.shape
        shape = shape[::-1] if x.transposed else shape
        index = self.tensor(replace(x, shape=shape), "operand", *self._known_layout(x.name, rows, taps))
        assert index is not None
        read, size = self.graph.reads[index], math.prod(shape)
        if x.name not in self._as_values:
            self._as_values[x.name] = self.emit_on_any("parameter", (), parameters=(index,), image=(size, 1, 1))
        columns = size // (read.rows * read.taps)
        memory = (Atom(read.rows, 1), Atom(columns, read.rows), Atom(read.taps, read.rows * columns))
        whole = Strided(self._as_values[x.name], size, False, 0, (merged(memory),), self.n, x.trained)
        value = whole.view(shape)
        if x.transposed:
            value = value.permute([1, 0])
        if x.floor > -math.inf:
            value = self.map("clamp", value, constants=(x.floor, math.inf))
        if x.exponential:
            value = self.map("exp", value)
        return value.expand(x.shape) if x.rows else value

    def _known_layout(self, name: str, rows: int, taps: int) -> tuple[int, int]:
        """Rows and taps as which another layer holds the tensor in memory; those that are given if there is none."""
        for read in self.graph.reads:
            if read.name == name:
                if read.slots > 1:
                    raise Unfusable(f"it reads {name}, of which each inner step has its own")
                return read.rows, read.taps
        return rows, taps

    def literal(self, t: Tensor) -> Strided:
        """A tensor that is made from numbers alone. An axis along which it is constant is not stored."""
        axes: list[Axis] = []
        kept = t.detach().to(torch.float64)
        for d in range(kept.dim()):
            if kept.shape[d] > 1 and bool((kept == kept.narrow(d, 0, 1)).all()):
                kept = kept.narrow(d, 0, 1)
        kept = kept.contiguous()
        for size, stored, stride in zip(t.shape, kept.shape, kept.stride(), strict=True):
            axes.append((Atom(size, stride if stored > 1 else 0),))
        name = f"a constant of forward {list(kept.shape)} " + hashlib.sha1(kept.numpy().tobytes()).hexdigest()[:16]
        self.graph.literals[name] = kept
        whole = self._of_parameter(Held(name, (kept.numel(),), False))
        return replace(whole, axes=tuple(map(merged, axes)))

    def _of_count(self, x: SampleCount) -> Strided:
        """The number of samples is a sum of ones over them."""
        ones = replace(self.literal(torch.ones(())), axes=((Atom(None, 0),),))
        n = self.map("affine", self.reduce("reduce", "sum", ones, [0], keepdim=False), constants=(1.0, float(x.offset)))
        return self.map("affine", self.map("power", n, constants=(x.power,)), constants=(x.factor, 0.0))

    def undo(self, mark: Any) -> None:
        super().undo(mark)
        self._as_values = {name: v for name, v in self._as_values.items() if v <= len(self.graph.nodes)}

    # -- layers over loops --------------------------------------------------------------------------------------

    def over_loops(
        self,
        kind: str,
        operands: Sequence[Strided],
        steps: Sequence[Step],
        reduced: Sequence[int] = (),
        order: Sequence[int] | None = None,
        apart: int = 0,
        **fields: Any,
    ) -> tuple[int, int, bool, list[Axis]]:
        """Adds a layer over loops.

        Args:
            steps: of the loops; their order is that of the result's axes.
            reduced: axes that the result does not have.
            order: of the steps in the loops; by default the one in which the first operand is in memory.
            apart: how many of the last steps must remain axes of the loops.
            fields: of the node.

        Returns:
            The number of the value; its size; whether it has samples; and its axes, those that are reduced without an
            atom. An axis along which all operands repeat their elements is not stored.
        """
        if sum(step.size is None for step in steps) > 1:
            raise Unfusable("it combines the samples with themselves")
        kept = [step.axis not in reduced for step in steps]
        order = list(order) if order is not None else self.order_in_memory(operands, steps)
        order.sort(key=lambda i: steps[i].size is not None)  # samples outside
        if kind != "move":  # the result repeats its elements where all operands do
            last = order[len(order) - apart :]
            order = [i for i in order if any(steps[i].strides) or not kept[i] or i in last]
        strides, size = [0] * len(steps), 1
        for i in reversed(order):
            step_size = steps[i].size
            if kept[i] and step_size is not None:
                strides[i] = size
                size *= step_size
        for i in order:
            if kept[i] and steps[i].size is None:
                strides[i] = size
        samples = any(kept[i] and steps[i].size is None for i in order)
        views = [
            View(x.size, x.samples, x.offset, tuple(steps[i].strides[j] for i in order)) for j, x in enumerate(operands)
        ]
        output = View(size, samples, 0, tuple(strides[i] for i in order))
        loops = merged_loops(Loops(tuple(steps[i].size for i in order), tuple(views), output), apart)
        number = self.emit_on_any(kind, [x.number for x in operands], loops=(loops,), **fields)
        axes: list[list[Atom]] = [[] for _ in range(1 + max((step.axis for step in steps), default=-1))]
        for i, step in enumerate(steps):
            if kept[i]:
                axes[step.axis].append(Atom(step.size, strides[i]))
        return number, size, samples, [merged(axis) for axis in axes]

    @staticmethod
    def order_in_memory(operands: Sequence[Strided], steps: Sequence[Step]) -> list[int]:
        """The order of steps in which the first operand that has them all stands in memory."""
        for j in range(len(operands)):
            if all(step.strides[j] for step in steps):
                return sorted(range(len(steps)), key=lambda i: -abs(steps[i].strides[j]))
        return list(range(len(steps)))

    def _value(self, result: tuple[int, int, bool, list[Axis]], dims: int, learned: bool) -> Strided:
        number, size, samples, axes = result
        axes += [()] * (dims - len(axes))
        return Strided(number, size, samples, 0, tuple(axes), self.n, learned)

    def align(self, operands: Sequence[Strided]) -> tuple[list[Strided], list[Step]]:
        """Operands that are broadcast against each other, and the steps of loops over all of them."""
        dims = max(len(x.axes) for x in operands)
        padded = [replace(x, axes=((),) * (dims - len(x.axes)) + x.axes) for x in operands]
        try:
            return padded, aligned([x.axes for x in padded], self.n)
        except NotAView:
            padded = [self.dense(x) if any(len(axis) > 1 for axis in x.axes) else x for x in padded]
        try:
            return padded, aligned([x.axes for x in padded], self.n)
        except NotAView:
            raise Unfusable("it combines axes that were merged from different ones") from None

    def dense(self, x: Strided) -> Strided:
        """A copy in torch's order of elements, except that samples are outside."""
        steps = aligned([x.axes], self.n)
        return self._value(self.over_loops("move", [x], steps, order=range(len(steps))), len(x.axes), x.learned)

    def dense_images(self, x: Strided, axes: int) -> Strided:
        """The same of images with this number of spatial axes, the last ones, in which channels are last in memory."""
        first = len(x.axes) - axes
        order = [*range(first - 1), *range(first, len(x.axes)), *range(max(first - 1, 0), first)]
        return self.dense(x.permute(order)).permute([order.index(d) for d in range(len(order))])

    def viewed(self, x: Strided, see: Callable[[Strided], Strided]) -> Strided:
        """see(x), of a copy where it is not a view of x itself."""
        try:
            return see(x)
        except NotAView:
            pass
        try:
            return see(self.dense(x))
        except NotAView:
            raise Unfusable("it mixes samples with other axes") from None

    def seen_as(self, x: Strided, shape: Sequence[int]) -> Strided:
        """torch.reshape."""
        return self.viewed(x, lambda x: x.view(shape))

    def map(self, name: str, *operands: Any, constants: tuple[float, ...] = ()) -> Strided:
        """A function of one or more operands, element by element."""
        given, steps = self.align([self.strided(x) for x in operands])
        instruction = Instruction(name, tuple(range(len(given))), constants)
        result = self.over_loops("map", given, steps, instructions=(instruction,))
        self.serve(name)
        return self._value(result, len(given[0].axes), any(x.learned for x in given))

    def reduce(self, kind: str, reduction: str, x: Strided, dims: Sequence[int], keepdim: bool) -> Strided:
        """The reduction over some axes."""
        steps = aligned([x.axes], self.n)
        order = sorted(range(len(steps)), key=lambda i: steps[i].axis in dims)
        result = self.over_loops(kind, [x], steps, reduced=dims, order=order, reduction=reduction)
        self.serve(reduction)
        y = self._value(result, len(x.axes), x.learned)
        return y if keepdim else _without(y, dims)

    def along(self, kind: str, x: Strided, dim: int) -> Strided:
        """softmax or log_softmax over one axis."""
        if any(atom.size is None for atom in x.axes[dim]):
            raise Unfusable("it is taken over the samples")
        if len(x.axes[dim]) > 1:
            x = self.dense(x)
        steps = aligned([x.axes], self.n)
        if not any(step.axis == dim for step in steps):  # of one element
            steps.append(Step(1, (0,), dim))
        order = sorted(range(len(steps)), key=lambda i: steps[i].axis == dim)
        result = self.over_loops(kind, [x], steps, order=order, apart=1)
        self.serve(kind)
        return self._value(result, len(x.axes), x.learned)

    def log_of_sum(self, x: Strided, dims: Sequence[int], keepdim: bool) -> Strided:
        """logsumexp: log sum exp(x - m) + m, where m is the largest element, whose derivative cancels."""
        m = self.stop(self.reduce("extreme", "amax", x, dims, keepdim=True))
        finite = self.map("where", self.map("eq", self.map("abs", m), math.inf), 0.0, m)
        total = self.reduce("reduce", "sum", self.map("exp", self.map("sub", x, finite)), dims, keepdim=True)
        y = self.map("add", self.map("log", total), finite)
        return y if keepdim else _without(y, dims)

    def stop(self, x: Strided) -> Strided:
        """The same value, whose derivative is taken to be zero."""
        steps = [Step(x.size, (1,), 0)]
        if x.samples:
            steps.insert(0, Step(None, (x.size,), 0))
        number, *_ = self.over_loops("stop", [replace(x, offset=0)], steps)
        self.serve("stop")
        return replace(x, number=number, learned=False)

    def concatenated(self, parts: Sequence[Strided], dim: int) -> Strided:
        """torch.cat."""
        while len(parts) > MOST_INPUTS:
            parts = [self.concatenated(parts[:MOST_INPUTS], dim), *parts[MOST_INPUTS:]]
        starts, end = [], 0
        for part in parts:
            starts.append(end)
            end += part.shape[dim]
        shape = list(parts[0].shape)
        shape[dim] = end
        return self.placed(parts, [{dim: start} for start in starts], shape)

    def padded(self, x: Strided, added: Sequence[tuple[int, int]], value: float = 0) -> Strided:
        """A number before and behind each axis. A negative size cuts elements off. In memory, axes keep their order."""
        for d, (before, after) in enumerate(added):
            if min(before, after) < 0:
                first, last = max(-before, 0), x.shape[d] - max(-after, 0)
                x = self.viewed(x, lambda x, d=d, first=first, last=last: x.slice(d, first, last - first))  # type: ignore[misc]
        more = [(max(before, 0), max(after, 0)) for before, after in added]
        if not any(map(any, more)):
            return x
        order = x.order
        inside = torch.ones([size if any(pair) else 1 for size, pair in zip(x.shape, more, strict=True)])
        shape = [x.shape[d] + sum(more[d]) for d in order]
        y = self.placed([x.permute(order)], [{i: more[d][0] for i, d in enumerate(order)}], shape)
        y = y.permute([order.index(d) for d in range(len(order))])
        if value == 0:
            return y
        mask = functional.pad(inside.to(torch.float64), [size for pair in reversed(more) for size in pair])
        return self.map("where", self.literal(mask), y, value)

    def placed(self, parts: Sequence[Strided], starts: Sequence[dict[int, int]], shape: Sequence[int]) -> Strided:
        """A tensor of this shape, zero but for parts that begin at starts[part][axis], in torch's order of elements
        except that samples are outside."""
        dims = range(len(shape))
        has_samples = [any(atom.size is None for part in parts for atom in part.axes[d]) for d in dims]
        for d in dims:
            if has_samples[d] and any(shape[d] != part.shape[d] for part in parts):
                raise Unfusable("it joins or pads the samples")
        sizes = [shape[d] // self.n if has_samples[d] else shape[d] for d in dims]  # of one sample
        strides = [math.prod(sizes[d + 1 :]) for d in dims]
        size, samples = math.prod(sizes), any(has_samples)
        whole = [
            (*((Atom(None, size),) if has_samples[d] else ()), Atom(sizes[d], strides[d])) for d in dims
        ]  # fmt: skip
        nests = []
        for part, start in zip(parts, starts, strict=True):
            to = [_shortened(axis, part.shape[d], self.n) for d, axis in enumerate(whole)]
            try:
                steps = aligned([part.axes, to], self.n)
            except NotAView:
                part = self.dense(part)
                steps = aligned([part.axes, to], self.n)
            steps.sort(key=lambda step: step.size is not None)
            offset = sum(strides[d] * first for d, first in start.items())
            from_part = View(part.size, part.samples, part.offset, tuple(step.strides[0] for step in steps))
            to_y = View(size, samples, offset, tuple(step.strides[1] for step in steps))
            loops = Loops(tuple(step.size for step in steps), (from_part,), to_y)
            nests.append((part.number, merged_loops(loops)))
        number = self.emit_on_any("move", [x for x, _ in nests], loops=tuple(loops for _, loops in nests))
        self.serve("move")
        learned = any(part.learned for part in parts)
        return Strided(number, size, samples, 0, tuple(map(merged, whole)), self.n, learned)

    def contract(self, a: Strided, b: Strided, shared: int, summed: int, order: Sequence[int] | None = None) -> Strided:
        """The sum of a[shared, m, k] b[shared, n, k] over k: [shared, m, n], each of them several axes.

        Args:
            shared, summed: how many axes both begin with, and end with.
            order: in which the axes of the result are in memory.
        """
        learned = a.learned or b.learned
        a, of_a = _without_repeated(a, range(len(a.axes) - summed))
        b, of_b = _without_repeated(b, range(len(b.axes) - summed))
        repeated = [axis or other for axis, other in zip(of_a[:shared], of_b, strict=False)]
        repeated += [*of_a[shared:], *of_b[shared:]]
        y = self._contract(a, b, shared, summed, order, learned)
        return replace(y, axes=tuple(axis or more for axis, more in zip(y.axes, repeated, strict=True)))

    def _contract(
        self, a: Strided, b: Strided, shared: int, summed: int, order: Sequence[int] | None, learned: bool
    ) -> Strided:
        for _ in range(2):
            m, n = len(a.axes) - shared - summed, len(b.axes) - shared - summed
            of_a = [*a.axes[: shared + m], *[()] * n, *a.axes[shared + m :]]
            of_b = [*b.axes[:shared], *[()] * m, *b.axes[shared:]]
            reduced = range(shared + m + n, shared + m + n + summed)
            try:
                steps = aligned([of_a, of_b], self.n)
            except NotAView:
                a, b = self.dense(a), self.dense(b)
                continue
            if all(all(step.strides) for step in steps if step.axis in reduced):
                places = [*(range(shared + m + n) if order is None else order), *reduced]
                in_memory = sorted(range(len(steps)), key=lambda i: places.index(steps[i].axis))
                result = self.over_loops("contract", [a, b], steps, reduced, order=in_memory)
                self.serve("contract")
                y = self._value(result, shared + m + n + summed, learned)
                return replace(y, axes=y.axes[: shared + m + n])
            a, b = self.dense(a), self.dense(b)  # one of them repeats its elements
        raise Unfusable("it is a product over axes that were merged from different ones")


def _shortened(axis: Axis, size: int, n: int) -> Axis:
    """The beginning of an axis of the output, as long as that of a part; of samples all."""
    (*samples, last) = axis
    return (*samples, Atom(size // n if samples else size, last.stride))


def _without(x: Strided, dims: Sequence[int]) -> Strided:
    """The same without these axes, which are of one element."""
    return replace(x, axes=tuple(axis for d, axis in enumerate(x.axes) if d not in dims))


def _without_repeated(x: Strided, dims: Sequence[int]) -> tuple[Strided, list[Axis]]:
    """The same without axes along which all elements are equal; and these axes, by dimension."""
    repeated = [x.axes[d] if all(atom.stride == 0 for atom in x.axes[d]) else () for d in dims]
    kept = [() if d < len(repeated) and repeated[d] else axis for d, axis in enumerate(x.axes)]
    return replace(x, axes=tuple(kept)), repeated

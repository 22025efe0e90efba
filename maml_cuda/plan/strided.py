"""Strided views of values: a permutation, an expansion or a part of a value is its memory in another order, and costs
nothing. Layers over loops (csrc/layers/loops.h) read such views.

An axis of a view is a list of atoms, each with a size and a stride, outer ones first. So axes that were merged, as in
[n, length, features] -> [n * length, features], remain a view whatever their strides are, and the samples remain an
atom of their own, told apart from other axes by where they come from, not by their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Known


class NotAView(Exception):
    """The memory would have to be copied into another order first."""


class Atom(NamedTuple):
    """A part of an axis.

    Attributes:
        size: None: the number of samples.
        stride: in elements.
    """

    size: int | None
    stride: int


Axis = tuple[Atom, ...]


@dataclass(frozen=True, repr=False)
class Strided(Known):
    """A view of a value of the graph.

    Attributes:
        number: of the value.
        size: its elements, of one sample if it has samples.
        samples: whether it has a part for each sample.
        offset: of the first element of the view.
        axes: of the view, as torch has them.
        n: the number of samples.
        learned: whether the value depends on a parameter that has a gradient.
    """

    number: int
    size: int
    samples: bool
    offset: int
    axes: tuple[Axis, ...]
    n: int
    learned: bool

    def __repr__(self) -> str:
        return "a value computed from x" if self.samples else "a value computed from parameters"

    def extent(self, axis: Axis) -> int:
        """The number of elements along an axis."""
        return math.prod(self.n if atom.size is None else atom.size for atom in axis)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(self.extent, self.axes))

    def axis(self, dim: int) -> int:
        """The number of an axis, counted from the first one.

        Raises:
            Unfusable: there is none. torch takes a 0-d tensor as if it had one.
        """
        if not self.axes:
            raise Unfusable("an operation along an axis of a 0-d tensor is not fused")
        return dim % len(self.axes)

    @property
    def order(self) -> list[int]:
        """The axes in the order in which they are in memory, outer ones first."""
        strides = [max((abs(atom.stride) for atom in axis), default=0) for axis in self.axes]
        return sorted(range(len(strides)), key=lambda d: -strides[d])

    @property
    def is_dense(self) -> bool:
        """Whether the elements of the view are those of the value, in order, but for samples, which are outside."""
        if self.offset:
            return False
        sizes = [(atom.size, atom.stride) for axis in self.axes for atom in axis]
        stride = 1
        for size, given in reversed([s for s in sizes if s[0] is not None]):
            if given != stride:
                return False
            stride *= size or 1
        samples = [given for size, given in sizes if size is None]
        return stride == self.size and samples == ([self.size] if self.samples else [])

    def with_axes(self, axes: Iterable[Axis], offset: int = 0) -> Strided:
        """The same value with other axes; `offset` is added."""
        return replace(self, axes=tuple(map(merged, axes)), offset=self.offset + offset)

    # -- views, as the torch functions of these names -------------------------------------------------------------

    def view(self, shape: Sequence[int]) -> Strided:
        """Raises NotAView."""
        atoms = list(merged([atom for axis in self.axes for atom in axis]))
        axes = [self._taken(atoms, size) for size in shape]
        if atoms:  # the samples of a set of one sample
            axes[-1:] = [(*axes[-1], *atoms)] if axes else [tuple(atoms)]
        return self.with_axes(axes)

    def _taken(self, atoms: list[Atom], size: int) -> Axis:
        """Takes the atoms of an axis of this size from the beginning of a list."""
        axis: list[Atom] = []
        if size == 1 and self.n == 1 and atoms and atoms[0].size is None:
            return (atoms.pop(0),)
        while size > 1:
            if not atoms:
                raise NotAView
            atom = atoms.pop(0)
            extent = self.extent((atom,))
            if size % extent == 0:
                axis.append(atom)
                size //= extent
            elif atom.size is not None and extent % size == 0:
                axis.append(Atom(size, atom.stride * (extent // size)))
                atoms.insert(0, Atom(extent // size, atom.stride))
                size = 1
            else:
                raise NotAView
        return tuple(axis)

    def permute(self, order: Sequence[int]) -> Strided:
        return self.with_axes(self.axes[d] for d in order)

    def unsqueeze(self, dim: int) -> Strided:
        return self.with_axes([*self.axes[:dim], (), *self.axes[dim:]])

    def expand(self, shape: Sequence[int]) -> Strided:
        axes: list[Axis] = [()] * (len(shape) - len(self.axes)) + list(self.axes)
        for d, size in enumerate(shape):
            if self.extent(axes[d]) == 1 and size > 1:
                if axes[d]:
                    raise Unfusable("it repeats the samples")
                axes[d] = (Atom(size, 0),)
        return self.with_axes(axes)

    def slice(self, dim: int, start: int, size: int, step: int = 1) -> Strided:
        """Elements start, start + step, ... of an axis. A negative step goes backwards. Raises NotAView."""
        axis = merged(self.axes[dim])
        if (start, size, step) == (0, self.extent(axis), 1):
            return self
        if any(atom.size is None for atom in axis):
            raise Unfusable("it takes a part of the samples")
        if not axis:  # of an axis of one element
            return self
        if len(axis) > 1:
            raise NotAView
        (_, stride), axes = axis[0], list(self.axes)
        axes[dim] = (Atom(size, stride * step),)
        return self.with_axes(axes, start * stride)

    def select(self, dim: int, index: int) -> Strided:
        """Raises NotAView."""
        part = self.slice(dim, index, 1)
        if self.n == 1 and any(atom.size is None for atom in part.axes[dim]):
            raise Unfusable("it takes one of the samples")
        return part.with_axes([*part.axes[:dim], *part.axes[dim + 1 :]])


def merged(axis: Iterable[Atom]) -> Axis:
    """The same axis with as few atoms as possible."""
    atoms: list[Atom] = []
    for atom in axis:
        if atom.size == 1:
            continue
        before = atoms[-1] if atoms else None
        if before and before.size and atom.size and before.stride == atom.stride * atom.size:
            atoms[-1] = Atom(before.size * atom.size, atom.stride)
        else:
            atoms.append(atom)
    return tuple(atoms)


class Step(NamedTuple):
    """One axis of loops.

    Attributes:
        size: None: the number of samples.
        strides: of each operand.
        axis: the axis of the operands that it is a part of.
    """

    size: int | None
    strides: tuple[int, ...]
    axis: int


def aligned(operands: Sequence[Sequence[Axis]], n: int) -> list[Step]:
    """The axes of several operands cut into common parts. Axes of one element are broadcast.

    Args:
        operands: for each operand its axes; all have as many.

    Raises:
        NotAView: their atoms have no common parts.
        Unfusable: samples of one operand meet something else in another.
    """
    steps: list[Step] = []
    for d in range(len(operands[0])):
        rests = [list(axes[d]) for axes in operands]
        while any(rests):
            heads = [rest[0] if rest else None for rest in rests]
            sizes = [head.size for head in heads if head is not None]
            if None in sizes:
                size, strides = None, [_samples_of(rest, n) for rest in rests]
            else:
                size = min(s for s in sizes if s is not None)
                strides = [_part_of(rest, size) for rest in rests]
            steps.append(Step(size, tuple(strides), d))
    return steps


def _samples_of(rest: list[Atom], n: int) -> int:
    """Takes the samples from the beginning of an axis; the stride."""
    if not rest:
        return 0
    size, stride = rest.pop(0)
    if size is None:
        return stride
    if stride != 0 or size % n:
        raise Unfusable("it combines the samples with another axis")
    if size > n:
        rest.insert(0, Atom(size // n, 0))
    return 0


def _part_of(rest: list[Atom], size: int) -> int:
    """Takes the outer part of this size from the beginning of an axis; the stride."""
    if not rest:
        return 0
    whole, stride = rest.pop(0)
    if whole is None or whole % size:
        raise NotAView
    if whole > size:
        rest.insert(0, Atom(whole // size, stride))
    return stride * (whole // size)

"""Writes the layers that read or write an operand at places that another one, the index, has along one axis: `gather`,
`scatter` and `sort` (csrc/layers). An index has whole numbers as values of the model's dtype, so no axis may be longer
than numbers are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.integers import most_exact
from maml_cuda.plan.loops import LoopWriter
from maml_cuda.plan.schema import IndexedAxis, Loops, View
from maml_cuda.plan.simplify import merged_loops
from maml_cuda.plan.strided import Atom, Axis, NotAView, Strided, aligned, merged


class Place(NamedTuple):
    """The place of an index among the axes of a result.

    Attributes:
        dim: the axis of the operand that is indexed.
        axes: how many axes the result has instead of it.
    """

    dim: int
    axes: int


def gathered(to: LoopWriter, table: Strided, index: Strided, place: Place) -> Strided:
    """The elements of a table in the places of an index. An index has the axes of the result, () where it is the same.

    Args:
        table: its axis `place.dim` is replaced by `place.axes` ones.
    """
    table = _with_axis(to, table, place.dim)
    for _ in range(2):
        given = table.with_axes(_replaced(table.axes, place))
        try:
            steps = aligned([given.axes, index.axes], to.n)
        except NotAView:
            table, index = to.dense(table), to.dense(index)
            continue
        axis = _indexed(to, table.axes[place.dim])
        number, size, samples, axes = to.over_loops("gather", [given, index], steps, axis=axis)
        to.serve("gather")
        axes += [()] * (len(given.axes) - len(axes))
        return Strided(number, size, samples, 0, tuple(axes), to.n, table.learned)
    raise Unfusable("it combines axes that were merged from different ones")


def scattered(to: LoopWriter, source: Strided, index: Strided, like: Strided, place: Place) -> Strided:
    """The sums of the elements of a source in the places of an index, 0 elsewhere.

    Args:
        source, index: have the axes of the result but for `place.dim`, which is replaced by `place.axes` ones.
        like: has the shape of the result. It has samples if one of the three has.
    """
    source, shape = _written_once(to, source), like.shape
    dims = range(len(shape))
    given = {d: d if d < place.dim else d + place.axes - 1 for d in dims if d != place.dim}  # the axis of the source
    with_samples = {
        d
        for d, own in given.items()
        if any(atom.size is None for axis in (like.axes[d], source.axes[own], index.axes[own]) for atom in axis)
    }
    sizes = [shape[d] // to.n if d in with_samples else shape[d] for d in dims]
    size, strides = math.prod(sizes), [math.prod(sizes[d + 1 :]) for d in dims]

    def axis_of(d: int, extent: int) -> Axis:
        """An axis of the result, or the beginning of one."""
        if d in with_samples:
            return Atom(None, size), Atom(extent // to.n, strides[d])
        return (Atom(extent, strides[d]),)

    whole = [axis_of(d, shape[d]) for d in dims]
    written = [axis_of(d, source.shape[given[d]]) if d in given else () for d in dims]
    for _ in range(2):
        try:
            steps = aligned([source.axes, index.axes, _replaced(written, place)], to.n)
            break
        except NotAView:
            source, index = to.dense(source), to.dense(index)
    else:
        raise Unfusable("it combines axes that were merged from different ones")
    steps.sort(key=lambda step: step.size is not None)
    views = [
        View(x.size, x.samples, x.offset, tuple(step.strides[j] for step in steps))
        for j, x in enumerate((source, index))
    ]
    output = View(size, bool(with_samples), 0, tuple(step.strides[2] for step in steps))
    loops = merged_loops(Loops(tuple(step.size for step in steps), tuple(views), output))
    axis = _indexed(to, merged(whole[place.dim]))
    number = to.emit_on_any("scatter", [source.number, index.number], loops=(loops,), axis=axis)
    to.serve("scatter")
    return Strided(number, size, bool(with_samples), 0, tuple(map(merged, whole)), to.n, source.learned)


def order_along(to: LoopWriter, given: Strided, dim: int, descending: bool) -> Strided:
    """The places of the elements in their order along an axis; equal elements keep their order."""
    x = _with_axis(to, given, dim)
    steps = aligned([x.axes], to.n)
    if not any(step.axis == dim for step in steps):  # of one element
        return to.literal(torch.zeros(x.shape, dtype=torch.float64))
    order = sorted(range(len(steps)), key=lambda i: steps[i].axis == dim)
    _indexed(to, x.axes[dim])
    number, size, samples, axes = to.over_loops(
        "sort", [x], steps, order=order, apart=1, constants=(float(descending),)
    )
    to.serve("sort")
    axes += [()] * (len(x.axes) - len(axes))
    return Strided(number, size, samples, 0, tuple(axes), to.n, False)


def _replaced(axes: Sequence[Axis], place: Place) -> list[Axis]:
    return [*axes[: place.dim], *[()] * place.axes, *axes[place.dim + 1 :]]


def _with_axis(to: LoopWriter, x: Strided, dim: int) -> Strided:
    """The same, in memory such that an index can go along an axis."""
    if any(atom.size is None for atom in x.axes[dim]):
        raise Unfusable("it selects among the samples")
    return to.dense(x) if len(x.axes[dim]) > 1 else _written_once(to, x, dim)


def _written_once(to: LoopWriter, x: Strided, dim: int | None = None) -> Strided:
    """The same, in memory such that loops over its axes come to no element twice, but for the axes along which it
    repeats its elements. This one must not be among these."""
    atoms = [atom for d, axis in enumerate(x.axes) for atom in axis if atom.size and (atom.stride or d == dim)]
    reach = 0
    for size, stride in sorted(atoms, key=lambda atom: abs(atom.stride)):
        if abs(stride) <= reach:
            return to.dense(x)
        reach += ((size or 1) - 1) * abs(stride)
    return x


def _indexed(to: LoopWriter, axis: Axis) -> IndexedAxis:
    """An axis of a single atom, or of one element."""
    if not axis:
        return IndexedAxis(1, 0)
    ((size, stride),) = axis
    assert size is not None
    if size > most_exact(to.dtype):
        raise Unfusable(f"it selects among {size} elements; fused are at most {most_exact(to.dtype)} in {to.dtype}")
    return IndexedAxis(size, stride)

"""Windows that slide over axes of a value, of which convolutions and pools are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.loops import LoopWriter
from maml_cuda.plan.schema import Loops, Slide, View
from maml_cuda.plan.strided import Atom, Axis, Strided, merged


class Sliding(NamedTuple):
    """How a window slides over one axis: at position p its tap t is at element p stride + t dilation - padding.

    Attributes:
        kernel: the number of taps.
        positions: their number.
    """

    kernel: int
    stride: int
    dilation: int
    padding: int
    positions: int

    @property
    def end(self) -> int:
        """One more than the last element to which it comes."""
        return (self.positions - 1) * self.stride + (self.kernel - 1) * self.dilation - self.padding + 1

    def is_view(self, size: int) -> bool:
        """Whether it stays in an axis of this size and reads each element at most once."""
        apart = min(self.kernel, self.positions) == 1 or self.stride > (self.kernel - 1) * self.dilation
        return apart and self.padding <= 0 and self.end <= size


def of_each(option: Sequence[int], axes: int) -> Sequence[int]:
    """An option of a convolution or a pool for each axis; a single number is that of all, as in padding="valid"."""
    return option if len(option) == axes else [*option] * axes


def windows(to: LoopWriter, given: Strided, sliding: Sequence[Sliding]) -> Strided:
    """The windows of x [..., size_1, size_2, ...] over its last axes, 0 outside of x: [..., positions_1, positions_2,
    ..., kernel_1, kernel_2, ...]. In memory, the axis before the sizes is the last one: channels, for an image.
    """
    first, count = len(given.axes) - len(sliding), len(sliding)
    if any(atom.size is None for axis in given.axes[first:] for atom in axis):
        raise Unfusable("it slides over the samples")
    is_plain = all(len(axis) <= 1 and all(atom.stride for atom in axis) for axis in given.axes[first:])
    x = given if is_plain else to.dense_images(given, count)
    axes: list[Axis] = [*x.axes[:first], *[()] * (2 * count)]  # of the result; as yet with the strides of x
    slid, offset = {}, 0
    for d, s in enumerate(sliding):
        (size, stride), *_ = x.axes[first + d] or (Atom(1, 0),)
        assert size is not None
        position, tap = first + d, first + count + d
        if s.is_view(size):
            axes[position], axes[tap] = (Atom(s.positions, s.stride * stride),), (Atom(s.kernel, s.dilation * stride),)
            offset -= s.padding * stride
        else:
            axes[position], axes[tap] = (Atom(s.positions, 0),), (Atom(s.kernel, 0),)
            slid[position] = slid[tap] = s, size, stride
    if not slid:
        return x.with_axes(axes, offset)

    channels = range(max(first - 1, 0), first)
    order = [*range(channels.start), *range(first, len(axes)), *channels]
    atoms = [(a, atom) for a in order for atom in axes[a] if a in slid or (atom.stride and atom.size != 1)]
    atoms.sort(key=lambda at: at[1].size is not None)  # samples outside
    sizes = tuple(atom.size for _, atom in atoms)
    y_size = math.prod(size for size in sizes if size is not None)
    y_strides = [y_size if s is None else math.prod(t or 1 for t in sizes[i + 1 :]) for i, s in enumerate(sizes)]
    place = {a: i for i, (a, _) in enumerate(atoms) if a in slid}
    slides = tuple(
        Slide(place[p], place[p + count], size, stride, s.stride, s.dilation, s.padding)
        for p, (s, size, stride) in slid.items()
        if p < first + count
    )
    from_x = View(x.size, x.samples, x.offset + offset, tuple(atom.stride for _, atom in atoms))
    to_y = View(y_size, x.samples, 0, tuple(y_strides))
    number = to.emit_on_any("windows", [x.number], loops=(Loops(sizes, (from_x,), to_y),), slides=slides)
    to.serve("windows")
    written = dict(zip(atoms, y_strides, strict=True))
    of_y = [[Atom(atom.size, written.get((a, atom), 0)) for atom in axis] for a, axis in enumerate(axes)]
    return Strided(number, y_size, x.samples, 0, tuple(map(merged, of_y)), x.n, x.learned)

"""Random masks in a graph. A node of the kind `dropout` is the product of a value with a mask and a number. The mask is
not stored: it follows from its number, its shape and the call (maml_cuda/masks.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from maml_cuda.capture.errors import Unfusable
from maml_cuda.masks import threshold
from maml_cuda.plan.graph import Known
from maml_cuda.plan.schema import Loops, Mask, View
from maml_cuda.plan.simplify import merged_loops
from maml_cuda.plan.strided import Atom, Axis, Strided, aligned, merged

if TYPE_CHECKING:
    from maml_cuda.plan.loops import LoopWriter

_MANY = 2**40  # more than a mask has elements for one sample


@dataclass(frozen=True, repr=False)
class Drawn(Known):
    """A mask that forward draws, times a number.

    Attributes:
        shape: of the tensor.
        number: of the masks of one forward pass.
        p: the probability of a one.
        factor: the number.
    """

    shape: tuple[int, ...]
    number: int
    p: float
    factor: float = 1.0

    def __repr__(self) -> str:
        return "a random mask"


def dropped(to: LoopWriter, x: Strided, mask: Drawn) -> Strided:
    """The product of a value with a mask; both may be broadcast."""
    dims = max(len(x.axes), len(mask.shape))
    shape = (1,) * (dims - len(mask.shape)) + mask.shape
    axes = [*((),) * (dims - len(x.axes)), *x.axes]
    for d, size in enumerate(shape):
        if size > 1 and all(atom.stride == 0 for atom in axes[d]):  # x repeats one element
            is_samples = d == 0 and size == to.n and not x.samples
            axes[d] = (Atom(None if is_samples else size, 0),)
        elif size not in (1, x.extent(axes[d])):
            raise Unfusable(f"its input {list(x.shape)} and a mask {list(mask.shape)} have other samples")
    steps = aligned([axes, _numbered(to, axes, shape)], to.n)
    order = to.order_in_memory([x], steps)
    order.sort(key=lambda i: steps[i].size is not None)  # samples outside
    order = [i for i in order if any(steps[i].strides)]  # the result repeats its elements where both do
    strides, size = [0] * len(steps), 1
    for i in reversed(order):
        strides[i] = size
        size *= steps[i].size or 1
    samples = any(steps[i].size is None for i in order)
    of_x, of_mask = (tuple(steps[i].strides[j] for i in order) for j in range(2))
    views = View(x.size, x.samples, x.offset, of_x), View(0, False, 0, of_mask)
    output = View(size, samples, 0, tuple(strides[i] for i in order))
    loops = merged_loops(Loops(tuple(steps[i].size for i in order), views, output))
    given, numbers = loops.inputs
    number = to.emit_on_any(
        "dropout", [x.number], constants=(mask.factor,), loops=(replace(loops, inputs=(given,)),),
        mask=Mask(
            mask.number, threshold(mask.p), tuple(s // _MANY if s >= _MANY else s for s in numbers.strides),
            tuple(s >= _MANY for s in numbers.strides),
        ),
    )  # fmt: skip
    to.serve("dropout")
    of_y: list[list[Atom]] = [[] for _ in axes]
    for step, stride in zip(steps, strides, strict=True):
        of_y[step.axis].append(Atom(step.size, stride))
    return Strided(number, size, samples, 0, tuple(map(merged, of_y)), to.n, x.learned)


def _numbered(to: LoopWriter, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes of the mask, cut like those of x. Its elements are numbered in torch's order; samples count as _MANY, so
    that a graph does not depend on their number."""
    stride, numbered = 1, []
    for axis, size in zip(reversed(axes), reversed(shape), strict=True):
        atoms = []
        for atom in reversed(axis):
            varies = size > 1 or (atom.size is None and to.n == 1)
            atoms.append(Atom(atom.size, stride if varies else 0))
            stride *= (_MANY if atom.size is None else atom.size) if varies else 1
        numbered.append(tuple(reversed(atoms)))
    return numbered[::-1]

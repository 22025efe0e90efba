"""Depthwise convolutions, of each channel by itself, as one layer (csrc/layers/depthwise.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from maml_cuda.plan.loops import LoopWriter
from maml_cuda.plan.schema import Loops, Slide, View
from maml_cuda.plan.simplify import MOST_AXES
from maml_cuda.plan.strided import Atom, Axis, Strided
from maml_cuda.plan.windows import Sliding


def depthwise(to: LoopWriter, x: Strided, w: Strided, sliding: Sequence[Sliding]) -> Strided | None:
    """The convolution of x [n, channels, *sizes] with w [channels, 1, *kernel]: [n, channels, *positions].

    In memory, channels are last in x, w and the result; x and w are copied where they are not.

    Returns:
        None where the weight depends on samples, or where samples are not along the first axis of x alone.
    """
    axes = len(sliding)
    if w.samples or any(atom.size is None for axis in x.axes[1:] for atom in axis):
        return None
    if len(x.axes[0]) + 2 * axes + 1 > MOST_AXES:
        return None
    w = w.select(1, 0)
    if not (_has_contiguous_channels(x.axes[1:]) and all(atom.stride for atom in x.axes[0])):
        x = to.dense_images(x, axes)
    if not _has_contiguous_channels(w.axes):
        w = to.dense(w.permute([*range(1, 1 + axes), 0])).permute([axes, *range(axes)])

    batch = sorted(x.axes[0], key=lambda atom: atom.size is not None)  # samples outside
    first, nothing = len(batch), [0] * axes
    channels, positions, kernel = x.shape[1], [s.positions for s in sliding], [s.kernel for s in sliding]
    outer, inner = [atom.size for atom in batch], [*positions, channels]
    size = math.prod(s for s in [*outer, *inner] if s is not None)
    strides = [size if s is None else math.prod(t or 1 for t in [*outer[i + 1 :], *inner]) for i, s in enumerate(outer)]
    within = [math.prod(inner[d + 1 :]) for d in range(axes)]
    x_view = View(x.size, x.samples, x.offset, (*(atom.stride for atom in batch), *nothing, *nothing, 1))
    w_view = View(w.size, False, w.offset, (*[0] * first, *nothing, *(_only(axis).stride for axis in w.axes[1:]), 1))
    y_view = View(size, x.samples, 0, (*strides, *within, *nothing, 1))
    loops = Loops((*outer, *positions, *kernel, channels), (x_view, w_view), y_view)
    slides = [
        Slide(first + d, first + axes + d, _only(axis).size or 1, _only(axis).stride, s.stride, s.dilation, s.padding)
        for d, (s, axis) in enumerate(zip(sliding, x.axes[2:], strict=True))
    ]
    number = to.emit_on_any("depthwise", [x.number, w.number], loops=(loops,), slides=tuple(slides))
    to.serve("depthwise")
    written = dict(zip(batch, strides, strict=True))
    samples = tuple(Atom(atom.size, written[atom]) for atom in x.axes[0])
    images = [(Atom(s, stride),) for s, stride in zip(positions, within, strict=True)]
    y = replace(x, number=number, size=size, offset=0, learned=x.learned or w.learned)
    return y.with_axes([samples, (Atom(channels, 1),), *images])


def _only(axis: Axis) -> Atom:
    return axis[0] if axis else Atom(1, 0)


def _has_contiguous_channels(axes: Sequence[Axis]) -> bool:
    """Whether the first axis, that of channels, is contiguous, and the others have one stride each."""
    channels, *others = axes
    return (
        all(len(axis) <= 1 for axis in axes)
        and all(_only(axis).stride for axis in others if axis)
        and (not channels or _only(channels).stride == 1)
    )

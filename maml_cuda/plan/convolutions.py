"""Convolutions and pools over any number of axes, made of windows (windows.py): a convolution is the product of the
windows with a weight, a pool is an extreme or a mean over their taps. Depthwise convolutions are a layer of their own
(depthwise.py).

They serve what the layers on signals and images (layers.py) do not: dilation, groups, transposed convolutions, three
spatial axes, weights that are computed, pools in ceil_mode. Methods have the names and signatures of ATen operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.depthwise import depthwise
from maml_cuda.plan.graph import Held
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.strided import Strided
from maml_cuda.plan.windows import Sliding, of_each, windows


class Convolutions:
    """Reads convolutions and pools.

    Attributes:
        to: writes the graph.
    """

    to: Layers

    def convolution(
        self, input: Any, weight: Any, bias: Any, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    ) -> Strided:  # fmt: skip
        x, given = self.to.strided(input), weight if isinstance(weight, Held) else self.to.strided(weight)
        kernel, positions = given.shape[2:], self.to.results[0][2:]
        axes = len(kernel)
        stride, padding, dilation = (of_each(option, axes) for option in (stride, padding, dilation))
        w = self.to.weight(given, 1 if transposed else given.shape[0], math.prod(kernel))
        sliding = [Sliding(*s) for s in zip(kernel, stride, dilation, padding, positions, strict=True)]
        is_depthwise = not transposed and groups == x.shape[1] == w.shape[0]
        y = depthwise(self.to, x, w, sliding) if is_depthwise else None
        if y is None:
            w = self.to.seen_as(w, (groups, w.shape[0] // groups, *w.shape[1:]))
            if transposed:
                y = self._transposed(x, w, stride, padding, dilation)
            else:
                y = self._product(x, sliding, w.permute([0, 1, *range(3, 3 + axes), 2]), 0)
                y = self.to.seen_as(y, self.to.results[0])
        if bias is None:
            return y
        added = self.to.strided(bias)
        return self.to.map("add", y, self.to.seen_as(added, (*added.shape, *[1] * axes)))

    def _product(self, x: Strided, sliding: Sequence[Sliding], w: Strided, parts: int) -> Strided:
        """The product of the windows of x with weights [groups, *parts, out, *kernel, in], of which there may be
        several axes of parts: [n, groups, out, *positions, *parts], in memory [n, *positions, *parts, groups, out]."""
        axes, groups = len(sliding), w.shape[0]
        n, channels, *sizes = x.shape
        if 1 < groups < channels and axes < 3:  # windows of each group, whose elements are then a row in memory
            taken = windows(self.to, self.to.seen_as(x, (n, groups, channels // groups, *sizes)), sliding)
        else:
            taken = windows(self.to, x, sliding)
            taken = self.to.seen_as(taken, (n, groups, channels // groups, *taken.shape[2:]))
        a = taken.permute([1, 0, *range(3, 3 + 2 * axes), 2])  # [groups, n, *positions, *kernel, in]
        pixels, out = range(2, 2 + axes + parts), 2 + axes + parts
        y = self.to.contract(a, w, 1, 1 + axes, order=[1, *pixels, 0, out])
        return y.permute([1, 0, out, *pixels])

    def _transposed(
        self, x: Strided, w: Strided, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Strided:
        """By weights [groups, in, out, *kernel]. Output q stride + part is the sum of x[q - j] w[j stride + part] over
        j, so this is a convolution for each part of the weight."""
        axes, sizes = len(stride), self.to.results[0][2:]
        w, sliding = self._spread(w, dilation), []
        for d, (step, before) in enumerate(zip(stride, padding, strict=True)):
            size, kernel = x.shape[2 + d], w.shape[3 + d]
            taps = -(-max(kernel, before + sizes[d] - (size - 1) * step) // step)
            w = self.to.padded(w, [(0, taps * step - kernel if a == 3 + d else 0) for a in range(3 + axes)])
            sliding.append(Sliding(taps, 1, 1, taps - 1, size + taps - 1))
        split = [size for s, step in zip(sliding, stride, strict=True) for size in (s.kernel, step)]
        w = self.to.seen_as(w, (*w.shape[:3], *split))
        kernel_axes, part_axes = range(3, 3 + 2 * axes, 2), range(4, 4 + 2 * axes, 2)
        for d in kernel_axes:
            w = self.to.viewed(w, lambda w, d=d: w.slice(d, w.shape[d] - 1, w.shape[d], -1))  # type: ignore[misc]
        order = [0, *kernel_axes, 1, *part_axes, 2]  # in memory, so that both factors have the summed axes as one
        w = self.to.dense(w.permute(order)).permute([order.index(d) for d in range(len(order))])
        y = self._product(x, sliding, w.permute([0, *part_axes, 2, *kernel_axes, 1]), axes)
        pairs = [d for i in range(axes) for d in (3 + i, 3 + axes + i)]
        whole = [s.positions * step for s, step in zip(sliding, stride, strict=True)]
        y = self.to.seen_as(y.permute([0, 1, 2, *pairs]), (x.shape[0], w.shape[0] * w.shape[2], *whole))
        y = self.to.dense_images(y, axes)
        for d, (before, size) in enumerate(zip(padding, sizes, strict=True), start=2):
            y = y.slice(d, before, size)
        return y

    def _spread(self, x: Strided, steps: Sequence[int]) -> Strided:
        """x with steps - 1 zeros between the elements of its last axes."""
        first = len(x.axes) - len(steps)
        for d, step in enumerate(steps, start=first):
            if step == 1 or x.shape[d] == 1:
                continue
            apart = x.unsqueeze(d + 1)
            added = [(0, step - 1 if a == d + 1 else 0) for a in range(len(apart.axes))]
            shape = [*x.shape[:d], x.shape[d] * step, *x.shape[d + 1 :]]
            size = shape[d] - step + 1
            x = self.to.seen_as(self.to.padded(apart, added), shape)
            x = self.to.viewed(x, lambda x, d=d, size=size: x.slice(d, 0, size))  # type: ignore[misc]
        return x

    # -- pools --------------------------------------------------------------------------------------------------

    def max_pool2d_with_indices(
        self, input: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1), ceil_mode: bool = False,
    ) -> tuple[Strided, None]:  # fmt: skip
        return self._max_pool(2, input, kernel_size, stride, padding, dilation), None

    def max_pool3d_with_indices(
        self, input: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1), ceil_mode: bool = False,
    ) -> tuple[Strided, None]:  # fmt: skip
        return self._max_pool(3, input, kernel_size, stride, padding, dilation), None

    def avg_pool2d(
        self, input: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Strided:  # fmt: skip
        return self._avg_pool(2, input, kernel_size, stride, padding, count_include_pad, divisor_override)

    def avg_pool3d(
        self, input: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0, 0),
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Strided:  # fmt: skip
        return self._avg_pool(3, input, kernel_size, stride, padding, count_include_pad, divisor_override)

    def _sliding(
        self, axes: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> list[Sliding]:
        options = (of_each(option, axes) for option in (kernel, stride or kernel, dilation, padding))
        return [Sliding(*option) for option in zip(*options, self.to.results[0][-axes:], strict=True)]

    def _max_pool(
        self, axes: int, input: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Strided:  # fmt: skip
        """Padding is -inf. Of equal maxima the first one has the derivative."""
        x = self.to.strided(input)
        sliding = self._sliding(axes, kernel, stride, padding, dilation)
        ends = [max(s.end - size, 0) for s, size in zip(sliding, x.shape[-axes:], strict=True)]
        added = [(s.padding, end) for s, end in zip(sliding, ends, strict=True)]
        x = self.to.padded(x, [(0, 0)] * (len(x.axes) - len(added)) + added, -math.inf)
        return self._over_taps("extreme", "max", x, [s._replace(padding=0) for s in sliding])

    def _avg_pool(
        self, axes: int, input: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        count_padding: bool, divisor: int | None,
    ) -> Strided:  # fmt: skip
        x = self.to.strided(input)
        sliding = self._sliding(axes, kernel, stride, padding, (1,))
        y = self._over_taps("reduce", "sum", x, sliding)
        counts = torch.ones((), dtype=torch.float64)
        for s, size in zip(sliding, x.shape[-axes:], strict=True):
            begin = torch.arange(s.positions) * s.stride - s.padding
            end = torch.clamp(begin + s.kernel, max=size + (s.padding if count_padding else 0))
            begin = begin if count_padding else torch.clamp(begin, min=0)
            counts = counts.unsqueeze(-1) * (end - begin)
        if divisor is not None:
            counts = torch.full_like(counts, divisor)
        return self.to.map("mul", y, self.to.literal(1 / counts))

    def _over_taps(self, kind: str, reduction: str, x: Strided, sliding: Sequence[Sliding]) -> Strided:
        """A reduction of each window."""
        axes, taken = len(sliding), windows(self.to, x, sliding)
        first = len(x.axes) - axes
        channels = [*range(first - 1, first)] if first else []
        before = [d for d in range(first) if d not in channels]
        order = [*before, *range(first, first + axes), *channels, *range(first + axes, first + 2 * axes)]
        y = self.to.reduce(kind, reduction, taken.permute(order), range(first + axes, first + 2 * axes), False)
        return y.permute([order.index(d) for d in range(first + axes)])

    # -- windows themselves -------------------------------------------------------------------------------------

    def im2col(
        self, input: Any, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
        stride: Sequence[int],
    ) -> Strided:  # fmt: skip
        """[n, channels taps, positions]"""
        x, axes = self.to.strided(input), len(kernel_size)
        options = [*zip(kernel_size, stride, dilation, padding, strict=True)]
        positions = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for (k, s, d, p), size in zip(options, x.shape[-axes:], strict=True)
        ]
        taken = windows(self.to, x, [Sliding(*o, count) for o, count in zip(options, positions, strict=True)])
        first = len(x.axes) - axes
        order = [*range(first), *range(first + axes, first + 2 * axes), *range(first, first + axes)]
        return self.to.seen_as(taken.permute(order), self.to.results[0])

    def unfold(self, input: Any, dimension: int, size: int, step: int) -> Strided:
        """The windows over one axis, whose taps are a new last axis."""
        x = self.to.strided(input)
        if not x.axes:
            raise Unfusable("it slides over the only element")
        dims = len(x.axes)
        d = dimension % dims
        order = [*(a for a in range(dims) if a != d), d]
        positions = self.to.results[0][d]
        taken = windows(self.to, x.permute(order), [Sliding(size, step, 1, 0, positions)])
        return taken.permute([*(order.index(a) for a in range(dims)), dims])

"""Views of tensors, and copies of parts of them. Methods have the names and signatures of ATen operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.strided import Strided


class TensorViews:
    """Reads these operations.

    Attributes:
        to: writes the graph.
    """

    to: Layers

    def view(self, x: Any, size: Sequence[int]) -> Strided:
        return self.to.seen_as(self.to.strided(x), self.to.results[0])

    reshape = _unsafe_view = _reshape_alias = view

    def squeeze(self, x: Any, dim: Any = None) -> Strided:
        return self.view(x, ())

    def unsqueeze(self, x: Any, dim: int) -> Strided:
        given = self.to.strided(x)
        return given.unsqueeze(dim % (len(given.axes) + 1))

    def permute(self, x: Any, dims: Sequence[int]) -> Strided:
        given = self.to.strided(x)
        return given.permute([given.axis(d) for d in dims])

    def transpose(self, x: Any, dim0: int, dim1: int) -> Strided:
        given = self.to.strided(x)
        axes = list(range(len(given.axes)))
        first, second = given.axis(dim0), given.axis(dim1)
        axes[first], axes[second] = axes[second], axes[first]
        return given.permute(axes)

    def t(self, x: Any) -> Strided:
        given = self.to.strided(x)
        return given.permute(range(len(given.axes))[::-1])

    def expand(self, x: Any, size: Sequence[int], *, implicit: bool = False) -> Strided:
        return self.to.strided(x).expand(self.to.results[0])

    def repeat(self, input: Any, repeats: Sequence[int]) -> Strided:
        x = self.to.strided(input)
        while len(x.axes) < len(repeats):
            x = x.unsqueeze(0)
        shape = x.shape
        for d in reversed(range(len(repeats))):
            if repeats[d] > 1:
                x = x.unsqueeze(d)
                x = x.expand([*x.shape[:d], repeats[d], *x.shape[d + 1 :]])
                x = self.to.seen_as(x, [*x.shape[:d], repeats[d] * shape[d], *x.shape[d + 2 :]])
        return x

    def slice(self, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Strided:
        x = self.to.strided(x)
        dim, size = x.axis(dim), self.to.results[0][dim]
        first = range(x.shape[dim])[slice(start, end, step)].start
        return self.to.viewed(x, lambda x: x.slice(dim, first, size, step))

    def select(self, x: Any, dim: int, index: int) -> Strided:
        x = self.to.strided(x)
        dim = x.axis(dim)
        return self.to.viewed(x, lambda x: x.select(dim, index % x.shape[dim]))

    def unbind(self, x: Any, dim: int = 0) -> tuple[Strided, ...]:
        return tuple(self.select(x, dim, i) for i in range(len(self.to.results)))

    def split(self, x: Any, split_size: Any, dim: int = 0) -> tuple[Strided, ...]:
        x, parts, start = self.to.strided(x), [], 0
        dim = x.axis(dim)
        for shape in self.to.results:
            first, size = start, shape[dim]
            parts.append(self.to.viewed(x, lambda x, first=first, size=size: x.slice(dim, first, size)))  # type: ignore[misc]
            start += size
        return tuple(parts)

    split_with_sizes = split

    def flip(self, input: Any, dims: Sequence[int]) -> Strided:
        x = self.to.strided(input)
        for d in dims:
            d, size = x.axis(d), x.shape[d]
            if size > 1:
                x = self.to.viewed(x, lambda x, d=d, size=size: x.slice(d, size - 1, size, -1))  # type: ignore[misc]
        return x

    def roll(self, input: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Strided:
        x = self.to.strided(input)
        if not dims:
            return self.to.seen_as(self.roll(self.to.seen_as(x, (math.prod(x.shape),)), shifts, (0,)), x.shape)
        for shift, d in zip(shifts, dims, strict=True):
            d, size = x.axis(d), x.shape[d]
            if cut := shift % size:
                parts = [
                    self.to.viewed(x, lambda x, d=d, size=size, cut=cut: x.slice(d, size - cut, cut)),  # type: ignore[misc]
                    self.to.viewed(x, lambda x, d=d, size=size, cut=cut: x.slice(d, 0, size - cut)),  # type: ignore[misc]
                ]
                x = self.to.concatenated(parts, d)
        return x

    def as_strided(self, input: Any, size: Sequence[int], stride: Sequence[int], storage_offset: Any = None) -> Strided:
        """torch gives the mean over all spatial axes of a channels-last tensor, [n, channels, 1, 1], other strides
        along the axes of one element."""
        x = self.to.strided(input)
        wanted = torch.empty(x.shape, device="meta").stride()
        same = all(s == w for s, w, extent in zip(stride, wanted, x.shape, strict=False) if extent > 1)
        if tuple(size) != x.shape or not same or storage_offset:
            raise Unfusable("as_strided is not fused")
        return x

    def clone(self, x: Any, *, memory_format: Any = None) -> Any:
        return x

    alias = detach = lift_fresh = contiguous = clone

    def _to_copy(self, x: Any, *, dtype: Any = None, **options: Any) -> Any:
        if dtype not in (None, self.to.dtype):
            raise Unfusable(f"a conversion to {dtype} is not fused")
        return x

    def cat(self, tensors: Sequence[Any], dim: int = 0) -> Strided:
        parts = [self.to.strided(x) for x in tensors]
        parts = [x for x in parts if x.shape != (0,)]
        return self.to.concatenated(parts, parts[0].axis(dim))

    def stack(self, tensors: Sequence[Any], dim: int = 0) -> Strided:
        parts = [self.to.strided(x) for x in tensors]
        dim = dim % (len(parts[0].axes) + 1)
        return self.to.concatenated([x.unsqueeze(dim) for x in parts], dim)

    def constant_pad_nd(self, x: Any, pad: Sequence[int], value: float = 0) -> Strided:
        x = self.to.strided(x)
        last = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
        added = [(0, 0)] * (len(x.axes) - len(last)) + last
        return self.to.padded(x, added, value)

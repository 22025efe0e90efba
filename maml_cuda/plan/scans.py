"""Sums and products of the elements of an axis, of all and of those so far. Methods have the names and signatures of
ATen operations."""

from __future__ import annotations

import math
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.resampling import Resampling
from maml_cuda.plan.strided import Strided

_LONGEST_PRODUCT = 1024  # with a triangular matrix


class Scans(Resampling):
    """Reads these operations."""

    def _along_axis(self, input: Any, dim: int, dtype: Any) -> tuple[Strided, int]:
        """The operand, and the number of the axis."""
        if dtype not in (None, self.to.dtype):
            raise Unfusable(f"a conversion to {dtype} is not fused")
        x = self.to.strided(input)
        x = x if x.axes else x.unsqueeze(0)
        return x, x.axis(dim)

    def cumsum(self, input: Any, dim: int, *, dtype: Any = None) -> Strided:
        x, d = self._along_axis(input, dim, dtype)
        return self.to.seen_as(self._sums(x, d), self.to.results[0])

    def _sums(self, x: Strided, d: int) -> Strided:
        """The sums of the elements so far: a product with a triangular matrix. Of a long axis, sums within blocks and
        then of blocks."""
        size, shape = x.shape[d], x.shape
        if size == 1:
            return x
        if size <= _LONGEST_PRODUCT:
            return self._times(x, torch.ones(size, size, dtype=torch.float64).tril(), d)
        width = math.isqrt(size - 1) + 1
        blocks = -(-size // width)
        x = self.to.padded(x, [(0, blocks * width - size if a == d else 0) for a in range(len(shape))])
        x = self._sums(self.to.seen_as(x, [*shape[:d], blocks, width, *shape[d + 1 :]]), d + 1)
        of_blocks = self._sums(self.to.viewed(x, lambda x: x.select(d + 1, width - 1)), d)
        before = self.to.viewed(of_blocks, lambda x: x.slice(d, 0, blocks - 1))
        before = self.to.padded(before, [(1 if a == d else 0, 0) for a in range(len(shape))])
        x = self.to.map("add", x, before.unsqueeze(d + 1))
        x = self.to.seen_as(x, [*shape[:d], blocks * width, *shape[d + 1 :]])
        return self.to.viewed(x, lambda x: x.slice(d, 0, size))

    def cumprod(self, input: Any, dim: int, *, dtype: Any = None) -> Strided:
        """Products of 2, 4, 8, ... elements that end at each: of one with that of as many elements before it."""
        x, d = self._along_axis(input, dim, dtype)
        size, step = x.shape[d], 1
        while step < size:
            before = self.to.viewed(x, lambda x, count=size - step: x.slice(d, 0, count))  # type: ignore[misc]
            before = self.to.padded(before, [(step if a == d else 0, 0) for a in range(len(x.axes))], 1.0)
            x, step = self.to.map("mul", x, before), 2 * step
        return self.to.seen_as(x, self.to.results[0])

    def prod(self, input: Any, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Strided:
        """The product of the first half of the elements and the second half, until one is left."""
        if dim is None:
            input, dim = self.to.strided(input), 0
            input = self.to.seen_as(input, (math.prod(input.shape),))
        x, d = self._along_axis(input, dim, dtype)
        while (size := x.shape[d]) > 1:
            half = size // 2
            parts = [
                self.to.viewed(x, lambda x, first=first, count=count: x.slice(d, first, count))  # type: ignore[misc]
                for first, count in ((0, half), (half, half), (2 * half, size % 2))
                if count
            ]
            x = self.to.map("mul", *parts[:2])
            x = self.to.concatenated([x, *parts[2:]], d) if size % 2 else x
        return self.to.seen_as(x, self.to.results[0])

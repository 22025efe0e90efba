"""Operations on images of any number of axes beside convolutions and pools over windows: resampling, adaptive pools,
shuffles of channels, padding by the image itself, and sums of windows.

Resampling is linear along each axis, so it is a product with a constant matrix [out, in]. Methods have the names and
signatures of ATen operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.convolutions import Convolutions
from maml_cuda.plan.strided import Strided
from maml_cuda.plan.windows import Sliding


class Resampling(Convolutions):
    """Reads these operations."""

    def _resampled(self, input: Any, axes: int, matrix_of: Callable[[int, int, int], Tensor]) -> Strided:
        """The product with matrix_of(axis, in, out) along the last axes, in float64. Axis -1 is the last one."""
        x, shape = self.to.strided(input), self.to.results[0]
        for d in range(len(x.axes) - axes, len(x.axes)):
            size, out = x.shape[d], shape[d]
            matrix = matrix_of(d - len(x.axes), size, out)
            if not torch.equal(matrix, torch.eye(size, dtype=torch.float64)):
                x = self._times(x, matrix, d)
        return x

    def _times(self, x: Strided, matrix: Tensor, d: int) -> Strided:
        """The product with a constant matrix along an axis, or the view that it is: a repetition of elements."""
        out, size = matrix.shape
        one = torch.eye(size, dtype=torch.float64)
        if out % size == 0 and torch.equal(matrix, one.repeat_interleave(out // size, 0)):
            each = x.unsqueeze(d + 1)
            each = each.expand([*x.shape[: d + 1], out // size, *x.shape[d + 1 :]])
            return self.to.seen_as(each, [*x.shape[:d], out, *x.shape[d + 1 :]])
        rest = [a for a in range(len(x.axes)) if a != d]
        place = [*rest, d]
        y = self.to.contract(
            x.permute(place), self.to.literal(matrix), 0, 1, order=[place.index(a) for a in x.order]
        )  # fmt: skip
        return y.permute([place.index(a) for a in range(len(place))])

    def _interpolated(self, name: str, input: Any, scales: Sequence[float | None], *options: Any) -> Strided:
        """The matrix of an axis is what torch makes of an identity matrix."""
        function = getattr(torch.ops.aten, name)
        in_1d = name.endswith("1d")

        def matrix_of(axis: int, size: int, out: int) -> Tensor:
            eye, scale = torch.eye(size, dtype=torch.float64), scales[axis]
            if in_1d:
                return function(eye.unsqueeze(0), [out], *options, scale)[0].t()  # type: ignore[no-any-return]
            return function(eye[None, :, None], [1, out], *options, None, scale)[0, :, 0].t()  # type: ignore[no-any-return]

        return self._resampled(input, len(self.to.results[0]) - 2, matrix_of)

    def upsample_nearest1d(self, input: Any, output_size: Any, *scales: Any) -> Strided:
        return self._interpolated("upsample_nearest1d", input, scales or (None,) * 3)

    def _upsample_nearest_exact1d(self, input: Any, output_size: Any, *scales: Any) -> Strided:
        return self._interpolated("_upsample_nearest_exact1d", input, scales or (None,) * 3)

    def upsample_linear1d(self, input: Any, output_size: Any, align_corners: bool, *scales: Any) -> Strided:
        return self._interpolated("upsample_linear1d", input, scales or (None,) * 3, align_corners)

    def upsample_bicubic2d(self, input: Any, output_size: Any, align_corners: bool, *scales: Any) -> Strided:
        return self._interpolated("upsample_bicubic2d", input, scales or (None,) * 2, align_corners)

    def _upsample_bilinear2d_aa(self, input: Any, output_size: Any, align_corners: bool, *scales: Any) -> Strided:
        return self._interpolated("_upsample_bilinear2d_aa", input, scales or (None,) * 2, align_corners)

    def _upsample_bicubic2d_aa(self, input: Any, output_size: Any, align_corners: bool, *scales: Any) -> Strided:
        return self._interpolated("_upsample_bicubic2d_aa", input, scales or (None,) * 2, align_corners)

    upsample_nearest2d = upsample_nearest3d = upsample_nearest1d
    _upsample_nearest_exact2d = _upsample_nearest_exact3d = _upsample_nearest_exact1d
    upsample_bilinear2d = upsample_trilinear3d = upsample_linear1d

    # -- adaptive pools -----------------------------------------------------------------------------------------

    def _adaptive_avg_pool2d(self, input: Any, output_size: Sequence[int]) -> Strided:
        return self._resampled(input, len(output_size), lambda axis, size, out: _means(size, out))

    _adaptive_avg_pool3d = adaptive_avg_pool1d = _adaptive_avg_pool2d

    def adaptive_max_pool2d(self, input: Any, output_size: Sequence[int]) -> tuple[Strided, None]:
        x, shape = self.to.strided(input), self.to.results[0]
        first = len(x.axes) - len(output_size)
        sizes = [*zip(x.shape[first:], shape[first:], strict=True)]
        if any(size % out for size, out in sizes):
            raise Unfusable(
                f"an adaptive maximum of {list(x.shape[first:])} elements in {list(shape[first:])} parts is not fused; "
                "one whose sizes divide is"
            )
        sliding = [Sliding(size // out, size // out, 1, 0, out) for size, out in sizes]
        return self._over_taps("extreme", "max", x, sliding), None

    adaptive_max_pool3d = adaptive_max_pool2d

    # -- padding by the image itself ----------------------------------------------------------------------------

    def reflection_pad1d(self, input: Any, padding: Sequence[int]) -> Strided:
        return self._padded_by(input, padding, lambda i, size: (size - 1) - abs((size - 1) - abs(i)))

    def replication_pad1d(self, input: Any, padding: Sequence[int]) -> Strided:
        return self._padded_by(input, padding, lambda i, size: min(max(i, 0), size - 1))

    reflection_pad2d = reflection_pad3d = reflection_pad1d
    replication_pad2d = replication_pad3d = replication_pad1d

    def _padded_by(self, input: Any, padding: Sequence[int], source: Callable[[int, int], int]) -> Strided:
        """Element i of an axis, of which -1 is before the first one, is source(i, size)."""
        x = self.to.strided(input)
        for i, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
            d = len(x.axes) - 1 - i
            size = x.shape[d]
            taken = [source(place, size) for place in range(-before, size + after)]
            matrix = torch.eye(size, dtype=torch.float64)[taken]
            if taken != list(range(size)):
                x = self._times(x, matrix, d)
        return x

    # -- channels and pixels ------------------------------------------------------------------------------------

    def pixel_shuffle(self, input: Any, upscale_factor: int) -> Strided:
        x, r = self.to.strided(input), upscale_factor
        *batch, channels, height, width = x.shape
        k = len(batch)
        split = self.to.seen_as(x, (*batch, channels // (r * r), r, r, height, width))
        return self.to.seen_as(split.permute([*range(k + 1), k + 3, k + 1, k + 4, k + 2]), self.to.results[0])

    def pixel_unshuffle(self, input: Any, downscale_factor: int) -> Strided:
        x, r = self.to.strided(input), downscale_factor
        *batch, channels, height, width = x.shape
        k = len(batch)
        split = self.to.seen_as(x, (*batch, channels, height // r, r, width // r, r))
        return self.to.seen_as(split.permute([*range(k + 1), k + 2, k + 4, k + 1, k + 3]), self.to.results[0])

    def channel_shuffle(self, input: Any, groups: int) -> Strided:
        x = self.to.strided(input)
        n, channels, *sizes = x.shape
        split = self.to.seen_as(x, (n, groups, channels // groups, *sizes))
        return self.to.seen_as(split.permute([0, 2, 1, *range(3, len(split.axes))]), x.shape)

    native_channel_shuffle = channel_shuffle

    # -- sums of windows ----------------------------------------------------------------------------------------

    def col2im(
        self, input: Any, output_size: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int],
        padding: Sequence[int], stride: Sequence[int],
    ) -> Strided:  # fmt: skip
        """Of windows [n, channels taps, positions] the image in which each of their elements is added where it was."""
        x, axes = self.to.strided(input), len(output_size)
        options = [*zip(output_size, kernel_size, dilation, padding, stride, strict=True)]
        positions = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in options]
        *batch, taps, _ = x.shape
        batch.append(taps // math.prod(kernel_size))  # channels
        x = self.to.seen_as(x, (*batch, *kernel_size, *positions))
        first = len(batch)
        pairs = [a for i in range(axes) for a in (first + i, first + axes + i)]
        counts = [k * count for k, count in zip(kernel_size, positions, strict=True)]
        x = self.to.seen_as(x.permute([*range(first), *pairs]), (*batch, *counts))
        for i, (size, k, d, p, s) in enumerate(options):
            place = torch.arange(k).unsqueeze(1) * d + torch.arange(positions[i]) * s - p
            matrix = (torch.arange(size).unsqueeze(1) == place.flatten()).to(torch.float64)
            x = self._times(x, matrix, first + i)
        return x


def _means(size: int, out: int) -> Tensor:
    """The matrix of an adaptive mean: output i is that of the elements from i size / out, rounded down, to
    (i + 1) size / out, rounded up."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        begin, end = i * size // out, math.ceil((i + 1) * size / out)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix

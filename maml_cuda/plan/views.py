"""Operations that change how a tensor is seen: views, copies, transposes, sizes. They write no layer, or `flatten`.

A view of a value computed from x is fused if each sample stays in its place and keeps the order of its elements. A view
of a parameter is kept in mind until a layer reads it. Methods have the names and signatures of ATen operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from maml_cuda.batch_norm import PerStepBatchNorm
from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Held, Known, LogSumExp, Value, text_of
from maml_cuda.plan.images import Images


class Views(Images):
    """Reads views.

    Attributes:
        model: the model, whose modules calls name.
    """

    def __init__(self, model: nn.Module, n: int, dtype: torch.dtype) -> None:
        super().__init__(n, dtype)
        self.model = model

    def module_at(self, path: str) -> nn.Module | None:
        """The module of this path; None for calls of the loss, which are in no module of the model."""
        return dict(self.model.named_modules(remove_duplicate=False)).get(path)

    def _seen_as(self, given: Any, shape: tuple[int, ...]) -> Known:
        """A tensor in another shape, with the same order of elements."""
        if isinstance(given, Held):
            same = math.prod(given.shape) == math.prod(shape) and _without_ones(given.shape) == _without_ones(shape)
            if shape == given.shape or (same and not given.transposed):
                return replace(given, shape=shape)
            raise Unfusable(f"it views {given} of shape {list(given.shape)} as {list(shape)}")
        x = self.value(given)
        if shape == x.shape:
            return x
        if not shape or shape[0] != self.n:
            raise Unfusable(f"it views {list(x.shape)} as {list(shape)}, whose first axis does not count samples")
        if len(shape) == 2:
            return self.features(x)
        if len(shape) == 1:  # one number a sample
            return replace(x, shape=shape)
        if shape[1] != x.sample[0]:
            raise Unfusable(f"the view of samples of shape {list(x.sample)} as {list(shape[1:])} is not fused")
        return replace(x, shape=shape)

    def view(self, x: Any, size: Sequence[int]) -> Known:
        return self._seen_as(x, self.results[0])

    reshape = _unsafe_view = _reshape_alias = view

    def squeeze(self, x: Any, dim: Any = None) -> Known:
        return self._seen_as(x, self.results[0])

    def unsqueeze(self, x: Any, dim: int) -> Known:
        return self._seen_as(x, self.results[0])

    def clone(self, x: Any, *, memory_format: Any = None) -> Any:
        return x

    alias = detach = lift_fresh = clone

    def _to_copy(self, x: Any, **options: Any) -> Any:
        raise Unfusable("a conversion to another dtype is not fused")

    def t(self, weight: Any) -> Known:
        if not isinstance(weight, Held) or len(weight.shape) != 2 or not replace(weight, transposed=False).whole:
            raise Unfusable(f"the transpose of {text_of(weight)} is not fused")
        return replace(weight, shape=weight.shape[::-1], transposed=not weight.transposed)

    def transpose(self, x: Any, dim0: int, dim1: int) -> Any:
        axes = list(range(len(x.shape)))
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
        return self.permute(x, axes)

    def permute(self, x: Any, dims: Sequence[int]) -> Any:
        axes = [d % len(x.shape) for d in dims]
        if axes == sorted(axes):
            return x
        if isinstance(x, Held) and len(axes) == 2:
            return self.t(x)
        raise Unfusable(f"the permutation {list(dims)} of {text_of(x)} is not fused")

    def slice(self, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
        if self.results[0] != x.shape or step != 1:
            raise Unfusable(f"a slice of {text_of(x)} is not fused")
        return x

    def select(self, x: Any, dim: int, index: int) -> Known:
        """The slot of a per-step layer."""
        per_step = isinstance(self.module_at(self.module), PerStepBatchNorm)
        if not per_step or not isinstance(x, Held) or dim != 0 or len(x.shape) != 2 or x.slot:
            raise Unfusable(f"a part of {text_of(x)} is not fused")
        return replace(x, shape=x.shape[1:], slot=True)

    def constant_pad_nd(self, input: Any, pad: Sequence[int], value: float = 0) -> Value:
        """Zeros around the spatial axes, as those of a convolution with padding="same"."""
        x = self.value(input)
        begin, end = pad[-2::-2], pad[::-2]  # from the first padded axis to the last one
        added = [(0, 0), (0, 0), *zip(begin, end, strict=True)][-2:]
        if (
            value != 0
            or len(pad) > 2 * (len(x.shape) - 2)
            or min(pad) < 0
            or any(e - b not in (0, 1) for b, e in added)
        ):
            raise Unfusable(f"the padding {list(pad)} is not fused; only that of a convolution is")
        return replace(x, padding=(added[0], added[1]))

    # -- log_std of a Gaussian policy -----------------------------------------------------------------------------

    def clamp(self, x: Any, min: Any = None, max: Any = None) -> Known:
        if not isinstance(x, Held) or x.exponential or max is not None or not isinstance(min, (int, float)):
            raise Unfusable("this clamp is not fused; only clamp(min=number) of a policy's log_std is")
        return replace(x, floor=float(min)) if float(min) > x.floor else x

    def exp(self, x: Any) -> Known:
        if not isinstance(x, Held) or x.exponential:
            raise Unfusable("this exponential is not fused; only that of a policy's log_std is")
        return replace(x, exponential=True)

    def clamp_min(self, x: Any, min: Any) -> Known:
        return self.clamp(x, min)

    def expand(self, x: Any, size: Sequence[int], *, implicit: bool = False) -> Any:
        shape = self.results[0]
        if shape == x.shape:
            return x
        if isinstance(x, Held) and _without_ones(x.shape) == _without_ones(shape[1:]) and shape[0] == self.n:
            return replace(x, shape=shape, rows=True)
        raise Unfusable(
            f"the expansion of {text_of(x)} is not fused; only that of a policy's log_std to one row a sample is"
        )

    # -- log_softmax of a prediction ------------------------------------------------------------------------------

    def _log_softmax(self, input: Any, dim: int, half_to_float: bool = False) -> Value:
        x = self.value(input)
        if len(x.shape) != 2 or dim % 2 != 1:
            raise Unfusable("this log_softmax is not fused; only that of a prediction [n, classes] is")
        return replace(self.features(x), log_softmax=True)

    def logsumexp(self, input: Any, dim: Sequence[int], keepdim: bool = False) -> LogSumExp:
        x = self.value(input)
        if len(x.shape) != 2 or [d % 2 for d in dim] != [1] or not keepdim:
            raise Unfusable("this logsumexp is not fused; only that of a prediction [n, classes] is")
        return LogSumExp(x)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]

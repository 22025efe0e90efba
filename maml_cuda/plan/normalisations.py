"""Normalisations of tensors with any number of axes behind that of channels, by the layers on signals.

Methods have the names and signatures of ATen operations.
"""

from __future__ import annotations

import math
from typing import Any

from maml_cuda.plan.graph import Held, Value
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.strided import Strided


class Normalisations:
    """Reads normalisations.

    Attributes:
        to: writes the graph.
    """

    to: Layers

    def native_batch_norm(
        self, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
        momentum: float, eps: float,
    ) -> tuple[Strided, None, None]:  # fmt: skip
        own, computed = _affine(weight, bias)
        x = self._as_signal(input)
        y, _, _ = self.to.native_batch_norm(x, *own, running_mean, running_var, training, momentum, eps)
        return self._as_given(y, *computed), None, None

    def native_group_norm(
        self, input: Any, weight: Any, bias: Any, n: int, channels: int, pixels: int, groups: int, eps: float
    ) -> tuple[Strided, None, None]:
        own, computed = _affine(weight, bias)
        y, _, _ = self.to.native_group_norm(self._as_signal(input), *own, n, channels, pixels, groups, eps)
        return self._as_given(y, *computed), None, None

    def instance_norm(
        self, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
        use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, cudnn_enabled: bool = True,
    ) -> Strided:  # fmt: skip
        x = self._as_signal(input)
        own, computed = _affine(weight, bias)
        y = self.to.instance_norm(x, running_mean, running_var, *own, use_input_stats, momentum, eps)
        return self._as_given(y, *computed)

    def _as_signal(self, input: Any) -> Value:
        """[n, channels, ...] as [n, channels, length]."""
        x = self.to.strided(input)
        n, channels, *sizes = x.shape
        return self.to.image(self.to.seen_as(x, (n, channels, math.prod(sizes))))

    def _as_given(self, y: Value, weight: Any, bias: Any) -> Strided:
        """A normalised signal in the shape of the result, times and plus what is computed for each channel."""
        shape = self.to.results[0]
        given = self.to.seen_as(self.to.strided(y), shape)
        for name, p in (("mul", weight), ("add", bias)):
            if p is not None:
                each = self.to.seen_as(self.to.strided(p), (shape[1], *[1] * (len(shape) - 2)))
                given = self.to.map(name, given, each)
        return given


def _affine(weight: Any, bias: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Weight and bias as those of a layer, and as those that are computed: one of both pairs is (None, None)."""
    held = all(p is None or isinstance(p, Held) for p in (weight, bias))
    return ((weight, bias), (None, None)) if held else ((None, None), (weight, bias))

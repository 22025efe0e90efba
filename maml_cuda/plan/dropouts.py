"""Dropout in train mode, and what else forward computes from bernoulli numbers of a fixed probability.

torch takes each kind of dropout apart: it fills a mask with bernoulli numbers, divides it by their probability, and
multiplies a value by it. A mask that is used in any other way becomes a value: its product with one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maml_cuda.plan.masks import Drawn, dropped
from maml_cuda.plan.tensors import Tensors


class Dropouts(Tensors):
    """Reads the operations of dropouts. What they do with other operands is as before."""

    def bernoulli(self, like: Any, p: Any = 0.5) -> Drawn:
        return Drawn(self.to.results[0], self.to.drawn, float(p))

    def mul(self, a: Any, b: Any) -> Any:
        if isinstance(a, Drawn):
            a, b = b, a
        if not isinstance(b, Drawn) or isinstance(a, Drawn):
            return super().mul(a, b)
        if isinstance(a, (int, float)):
            return replace(b, factor=b.factor * a)
        return dropped(self.to, self.to.strided(a), b)

    def div(self, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
        if isinstance(a, Drawn) and isinstance(b, (int, float)) and b != 0 and rounding_mode is None:
            return replace(a, factor=a.factor / b)
        return super().div(a, b, rounding_mode=rounding_mode)

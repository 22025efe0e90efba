"""Functions of single elements that are made of those in csrc/layers. Methods have the names and signatures of ATen
operations."""

from __future__ import annotations

import math
from typing import Any

from maml_cuda.plan.scans import Scans
from maml_cuda.plan.strided import Strided


class Elementary(Scans):
    """Reads these operations."""

    def _scaled(self, x: Any, factor: float) -> Strided:
        return self.to.map("affine", x, constants=(factor, 0.0))

    def glu(self, input: Any, dim: int = -1) -> Strided:
        x = self.to.strided(input)
        d = dim % len(x.axes)
        half = x.shape[d] // 2
        a, b = (self.to.viewed(x, lambda x, i=i: x.slice(d, i * half, half)) for i in range(2))  # type: ignore[misc]
        return self.to.map("mul", a, self.to.map("sigmoid", b))

    def softshrink(self, x: Any, lambd: float = 0.5) -> Strided:
        return self.to.map("sub", x, self.to.map("clamp", x, constants=(-float(lambd), float(lambd))))

    def hardshrink(self, x: Any, lambd: float = 0.5) -> Strided:
        return self.to.map("where", self.to.map("le", self.to.map("abs", x), lambd), 0.0, x)

    def threshold(self, x: Any, threshold: float, value: float) -> Strided:
        return self.to.map("where", self.to.map("le", x, threshold), value, x)

    def tan(self, x: Any) -> Strided:
        return self.to.map("div", self.to.map("sin", x), self.to.map("cos", x))

    def atanh(self, x: Any) -> Strided:
        above, below = self.to.map("log1p", x), self.to.map("log1p", self._scaled(x, -1.0))
        return self._scaled(self.to.map("sub", above, below), 0.5)

    def log2(self, x: Any) -> Strided:
        return self._scaled(self.to.map("log", x), 1 / math.log(2))

    def log10(self, x: Any) -> Strided:
        return self._scaled(self.to.map("log", x), 1 / math.log(10))

    def logit(self, x: Any, eps: float | None = None) -> Strided:
        if eps is not None:
            x = self.to.map("clamp", x, constants=(float(eps), 1 - float(eps)))
        return self.to.map("sub", self.to.map("log", x), self.to.map("log1p", self._scaled(x, -1.0)))

    def logaddexp(self, a: Any, b: Any) -> Strided:
        """log(exp(a) + exp(b)) with the larger one, whose derivative cancels, outside."""
        m = self.to.stop(self.to.map("maximum", a, b))
        m = self.to.map("where", self.to.map("eq", self.to.map("abs", m), math.inf), 0.0, m)
        total = self.to.map("add", *(self.to.map("exp", self.to.map("sub", x, m)) for x in (a, b)))
        return self.to.map("add", self.to.map("log", total), m)

    def hypot(self, a: Any, b: Any) -> Strided:
        squares = (self.to.map("power", x, constants=(2.0,)) for x in (a, b))
        return self.to.map("sqrt", self.to.map("add", *squares))

    def sgn(self, x: Any) -> Strided:
        return self.to.map("sign", x)

    def isnan(self, x: Any) -> Strided:
        return self.to.map("ne", x, x)

"""Arithmetic and functions of single elements: those of csrc/layers, and what is made of them. Methods have the names
and signatures of ATen operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Constant
from maml_cuda.plan.scans import Scans
from maml_cuda.plan.strided import Strided
from maml_cuda.plan.tensor_views import TensorViews

# Functions of one operand, and of several, whose names in ATen are those in csrc/layers.
_FUNCTIONS = ("relu", "silu", "tanh", "sigmoid", "sin", "cos", "exp", "expm1", "log", "log1p", "erf", "sqrt", "rsqrt",
              "reciprocal", "abs", "sign")  # fmt: skip
_COMBINATIONS = ("sub", "atan2", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where")


class Elementary(TensorViews, Scans):
    """Reads these operations."""

    def add(self, a: Any, b: Any, *, alpha: float = 1) -> Strided:
        if _is_number(b):
            return self._affine(a, 1.0, alpha * b)
        if _is_number(a):
            return self._affine(b, float(alpha), a)
        return self.to.map("add", a, b if alpha == 1 else self._affine(b, float(alpha), 0.0))

    def sub(self, a: Any, b: Any, *, alpha: float = 1) -> Strided:
        if alpha == 1 and not _is_number(a) and not _is_number(b):
            return self.to.map("sub", a, b)
        return self.add(a, b, alpha=-alpha)

    def rsub(self, a: Any, b: Any, alpha: float = 1) -> Strided:
        return self.sub(b, a, alpha=alpha)

    def mul(self, a: Any, b: Any) -> Strided:
        if _is_number(b):
            return self._affine(a, float(b), 0.0)
        if _is_number(a):
            return self._affine(b, float(a), 0.0)
        return self.to.map("mul", a, b)

    def div(self, a: Any, b: Any, *, rounding_mode: str | None = None) -> Strided:
        if rounding_mode is not None:
            raise Unfusable(f"a quotient with rounding_mode={rounding_mode!r} is not fused")
        if _is_number(b) and b != 0:
            return self._affine(a, 1 / b, 0.0)
        return self.to.map("div", a, b)

    def neg(self, x: Any) -> Strided:
        return self._affine(x, -1.0, 0.0)

    def _affine(self, x: Any, factor: float, summand: float) -> Strided:
        return self.to.map("affine", x, constants=(float(factor), float(summand)))

    def pow(self, a: Any, b: Any) -> Strided:
        return self.to.map("power", a, constants=(float(b),)) if _is_number(b) else self.to.map("pow", a, b)

    def square(self, x: Any) -> Strided:
        return self.pow(x, 2)

    def addcmul(self, x: Any, a: Any, b: Any, *, value: float = 1) -> Strided:
        return self.add(x, self.to.map("mul", a, b), alpha=value)

    def addcdiv(self, x: Any, a: Any, b: Any, *, value: float = 1) -> Strided:
        return self.add(x, self.to.map("div", a, b), alpha=value)

    def lerp(self, a: Any, b: Any, weight: Any) -> Strided:
        return self.add(a, self.mul(self.sub(b, a), weight))

    def clamp(self, x: Any, min: Any = None, max: Any = None) -> Strided:
        if not all(bound is None or _is_number(bound) for bound in (min, max)):
            y = x if min is None else self.to.map("where", self.to.map("ge", x, min), x, min)
            return y if max is None else self.to.map("where", self.to.map("le", y, max), y, max)
        low, high = (-math.inf if min is None else float(min)), (math.inf if max is None else float(max))
        return self.to.map("clamp", x, constants=(low, high))

    def clamp_min(self, x: Any, min: Any) -> Strided:
        return self.clamp(x, min, None)

    def clamp_max(self, x: Any, max: Any) -> Strided:
        return self.clamp(x, None, max)

    def masked_fill(self, x: Any, mask: Any, value: Any) -> Strided:
        return self.to.map("where", mask, value, x)

    def zeros_like(self, x: Any, **options: Any) -> Constant:
        return self._constant(0.0)

    empty_like = zeros_like  # memory that is written next

    def ones_like(self, x: Any, **options: Any) -> Constant:
        return self._constant(1.0)

    def full_like(self, x: Any, value: float, **options: Any) -> Constant:
        return self._constant(value)

    def new_zeros(self, x: Any, size: Sequence[int], **options: Any) -> Constant:
        return self._constant(0.0)

    new_empty = new_zeros  # memory that is written next

    def new_ones(self, x: Any, size: Sequence[int], **options: Any) -> Constant:
        return self._constant(1.0)

    def new_full(self, x: Any, size: Sequence[int], value: float, **options: Any) -> Constant:
        return self._constant(value)

    def _constant(self, value: float) -> Constant:
        shape = self.to.results[0]
        return Constant("a tensor made in forward", False, lambda: torch.full(shape, value, dtype=torch.float64))

    def cosh(self, x: Any) -> Strided:
        return self._affine(self.add(self.to.map("exp", x), self.to.map("exp", self.neg(x))), 0.5, 0.0)

    def sinh(self, x: Any) -> Strided:
        """(exp(x) - exp(-x)) / 2, of differences from 1, so that no digit of a small x is lost."""
        return self._affine(self.sub(self.to.map("expm1", x), self.to.map("expm1", self.neg(x))), 0.5, 0.0)

    def xlogy(self, x: Any, y: Any) -> Strided:
        """x log y; 0 where x is 0 and y is not positive."""
        empty = self.logical_and(self.to.map("eq", x, 0.0), self.to.map("le", y, 0.0))
        return self.to.map("where", empty, 0.0, self.to.map("mul", x, self.to.map("log", y)))

    def logical_not(self, x: Any) -> Strided:
        return self.to.map("eq", x, 0.0)

    bitwise_not = logical_not  # of a mask

    def logical_and(self, a: Any, b: Any) -> Strided:
        return self.to.map("mul", self.to.map("ne", a, 0.0), self.to.map("ne", b, 0.0))

    bitwise_and = logical_and

    def logical_or(self, a: Any, b: Any) -> Strided:
        return self.to.map("maximum", self.to.map("ne", a, 0.0), self.to.map("ne", b, 0.0))

    bitwise_or = logical_or

    def tril(self, x: Any, diagonal: int = 0) -> Strided:
        return self._triangle(x, torch.tril, diagonal)

    def triu(self, x: Any, diagonal: int = 0) -> Strided:
        return self._triangle(x, torch.triu, diagonal)

    def _triangle(self, x: Any, part: Any, diagonal: int) -> Strided:
        x = self.to.strided(x)
        mask = self.to.literal(part(torch.ones(x.shape[-2:], dtype=torch.float64), diagonal))
        return self.to.map("where", mask, x, 0.0)

    def log_sigmoid_forward(self, x: Any) -> tuple[Strided, None]:
        return self.to.map("log_sigmoid", x), None

    def leaky_relu(self, x: Any, negative_slope: float = 0.01) -> Strided:
        return self.to.map("leaky_relu", x, constants=(float(negative_slope),))

    # The constants of elu are (a, b, c): b x for x > 0, otherwise b a (exp(x / c) - 1).

    def elu(self, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Strided:
        return self.to.map("elu", x, constants=(float(alpha), float(scale), 1 / input_scale))

    def celu(self, x: Any, alpha: float = 1) -> Strided:
        return self.to.map("elu", x, constants=(float(alpha), 1.0, float(alpha)))

    def gelu(self, x: Any, *, approximate: str = "none") -> Strided:
        return self.to.map("gelu" if approximate == "none" else "gelu_tanh", x)

    def softplus(self, x: Any, beta: float = 1, threshold: float = 20) -> Strided:
        return self.to.map("softplus", x, constants=(float(beta), float(threshold)))

    def hardtanh(self, x: Any, min_val: float = -1, max_val: float = 1) -> Strided:
        return self.to.map("hardtanh", x, constants=(float(min_val), float(max_val)))

    def hardsigmoid(self, x: Any) -> Strided:
        return self._affine(self.to.map("hardtanh", x, constants=(-3.0, 3.0)), 1 / 6, 0.5)

    def hardswish(self, x: Any) -> Strided:
        return self.to.map("mul", x, self.hardsigmoid(x))

    def mish(self, x: Any) -> Strided:
        return self.to.map("mul", x, self.to.map("tanh", self.softplus(x)))

    def prelu(self, x: Any, weight: Any) -> Strided:
        x, weight = self.to.strided(x), self.to.strided(weight)
        if len(weight.axes) == 1 and len(x.axes) > 2:
            weight = self.to.seen_as(weight, (*weight.shape, *[1] * (len(x.axes) - 2)))
        return self.to.map("where", self.to.map("gt", x, 0.0), x, self.to.map("mul", weight, x))

    _prelu_kernel = prelu

    def glu(self, input: Any, dim: int = -1) -> Strided:
        x = self.to.strided(input)
        d = x.axis(dim)
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
        above, below = self.to.map("log1p", x), self.to.map("log1p", self.neg(x))
        return self._affine(self.to.map("sub", above, below), 0.5, 0.0)

    def log2(self, x: Any) -> Strided:
        return self._affine(self.to.map("log", x), 1 / math.log(2), 0.0)

    def log10(self, x: Any) -> Strided:
        return self._affine(self.to.map("log", x), 1 / math.log(10), 0.0)

    def logit(self, x: Any, eps: float | None = None) -> Strided:
        if eps is not None:
            x = self.to.map("clamp", x, constants=(float(eps), 1 - float(eps)))
        return self.to.map("sub", self.to.map("log", x), self.to.map("log1p", self.neg(x)))

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


def _function(name: str) -> Any:
    def method(self: Elementary, *operands: Any) -> Strided:
        return self.to.map(name, *operands)

    return method


for _name in (*_FUNCTIONS, *_COMBINATIONS):
    if _name not in vars(Elementary):
        setattr(Elementary, _name, _function(_name))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float))

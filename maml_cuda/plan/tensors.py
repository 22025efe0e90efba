"""Operations on tensors of any shape: one method for each ATen operation, which writes layers over loops or a view.

They serve what the layers on features, signals and images (layers.py) do not. A method has the name and the signature
of the operation, and returns what the operation returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.elementary import Elementary
from maml_cuda.plan.graph import Constant, Held, SampleCount, Value, text_of
from maml_cuda.plan.indexing import Indexing
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.normalisations import Normalisations
from maml_cuda.plan.recurrences import Recurrences
from maml_cuda.plan.strided import Strided

# Functions of one operand, and functions of several, whose names in ATen are those in csrc/layers.
_FUNCTIONS = ("relu", "silu", "tanh", "sigmoid", "sin", "cos", "exp", "expm1", "log", "log1p", "erf", "sqrt", "rsqrt",
              "reciprocal", "abs", "sign")  # fmt: skip
_COMBINATIONS = ("sub", "atan2", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where")


class Tensors(Elementary, Normalisations, Recurrences, Indexing):
    """Reads operations on tensors of any shape.

    Attributes:
        to: writes the graph.
    """

    def __init__(self, to: Layers) -> None:
        self.to = to

    # -- views --------------------------------------------------------------------------------------------------

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
        return given.permute([d % len(given.axes) for d in dims])

    def transpose(self, x: Any, dim0: int, dim1: int) -> Strided:
        given = self.to.strided(x)
        axes = list(range(len(given.axes)))
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
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
        dim, size = dim % len(x.axes), self.to.results[0][dim]
        first = range(x.shape[dim])[slice(start, end, step)].start
        return self.to.viewed(x, lambda x: x.slice(dim, first, size, step))

    def select(self, x: Any, dim: int, index: int) -> Strided:
        x = self.to.strided(x)
        dim = dim % len(x.axes)
        return self.to.viewed(x, lambda x: x.select(dim, index % x.shape[dim]))

    def unbind(self, x: Any, dim: int = 0) -> tuple[Strided, ...]:
        return tuple(self.select(x, dim, i) for i in range(len(self.to.results)))

    def split(self, x: Any, split_size: Any, dim: int = 0) -> tuple[Strided, ...]:
        x, parts, start = self.to.strided(x), [], 0
        dim = dim % len(x.axes)
        for shape in self.to.results:
            first, size = start, shape[dim]
            parts.append(self.to.viewed(x, lambda x, first=first, size=size: x.slice(dim, first, size)))  # type: ignore[misc]
            start += size
        return tuple(parts)

    split_with_sizes = split

    def flip(self, input: Any, dims: Sequence[int]) -> Strided:
        x = self.to.strided(input)
        for d in dims:
            d, size = d % len(x.axes), x.shape[d]
            if size > 1:
                x = self.to.viewed(x, lambda x, d=d, size=size: x.slice(d, size - 1, size, -1))  # type: ignore[misc]
        return x

    def roll(self, input: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Strided:
        x = self.to.strided(input)
        if not dims:
            return self.to.seen_as(self.roll(self.to.seen_as(x, (math.prod(x.shape),)), shifts, (0,)), x.shape)
        for shift, d in zip(shifts, dims, strict=True):
            d, size = d % len(x.axes), x.shape[d]
            if cut := shift % size:
                parts = [
                    self.to.viewed(x, lambda x, d=d, size=size, cut=cut: x.slice(d, size - cut, cut)),  # type: ignore[misc]
                    self.to.viewed(x, lambda x, d=d, size=size, cut=cut: x.slice(d, 0, size - cut)),  # type: ignore[misc]
                ]
                x = self.to.concatenated(parts, d)
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
        return self.to.concatenated(parts, dim % len(parts[0].axes))

    def stack(self, tensors: Sequence[Any], dim: int = 0) -> Strided:
        parts = [self.to.strided(x) for x in tensors]
        dim = dim % (len(parts[0].axes) + 1)
        return self.to.concatenated([x.unsqueeze(dim) for x in parts], dim)

    def constant_pad_nd(self, x: Any, pad: Sequence[int], value: float = 0) -> Strided:
        x = self.to.strided(x)
        last = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
        added = [(0, 0)] * (len(x.axes) - len(last)) + last
        return self.to.padded(x, added, value)

    # -- element by element -------------------------------------------------------------------------------------

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
        return self._affine(self.sub(self.to.map("exp", x), self.to.map("exp", self.neg(x))), 0.5, 0.0)

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

    # -- over axes ----------------------------------------------------------------------------------------------

    def _dims(self, x: Strided, dim: Any) -> list[int]:
        given = range(len(x.axes)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        return [d % len(x.axes) for d in given] if x.axes else []

    def sum(self, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Strided:
        return self._reduce("reduce", "sum", self._to_copy(x, dtype=dtype), dim, keepdim)

    def mean(self, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Strided:
        x = self.to.strided(self._to_copy(x, dtype=dtype))
        dims = self._dims(x, dim)
        # The mean of equal elements, such as the deviations of a policy repeated for each sample, is one of them.
        axes = (
            tuple(atom for atom in axis if d not in dims or atom.size is None or atom.stride != 0)
            for d, axis in enumerate(x.axes)
        )
        return self.to.reduce("reduce", "mean", x.with_axes(axes), dims, keepdim)

    def amax(self, x: Any, dim: Any = None, keepdim: bool = False) -> Strided:
        return self._reduce("extreme", "amax", x, dim, keepdim)

    def amin(self, x: Any, dim: Any = None, keepdim: bool = False) -> Strided:
        return self._reduce("extreme", "amin", x, dim, keepdim)

    def max(self, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        """Over one axis: also the positions, which no layer reads. Over all elements, ties share the derivative."""
        if dim is None:
            return self.amax(x)
        return self._reduce("extreme", "max", x, dim, keepdim), None

    def min(self, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is None:
            return self.amin(x)
        return self._reduce("extreme", "min", x, dim, keepdim), None

    def _reduce(self, kind: str, reduction: str, x: Any, dim: Any, keepdim: bool) -> Strided:
        x = self.to.strided(x)
        return self.to.reduce(kind, reduction, x, self._dims(x, dim), keepdim)

    def var(self, x: Any, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Strided:
        x = self.to.strided(x)
        dims = self._dims(x, dim)
        mean = self.to.reduce("reduce", "mean", x, dims, True)
        square = self.to.map("power", self.to.map("sub", x, mean), constants=(2.0,))
        count = math.prod(x.shape[d] for d in dims)
        correction = 1 if correction is None else correction
        if count <= correction:
            raise Unfusable(f"a variance of {count} elements with correction={correction} is not fused")
        total = self.to.reduce("reduce", "sum", square, dims, keepdim)
        if any(atom.size is None for d in dims for atom in x.axes[d]):
            each = count // self.to.n  # elements of a sample
            return self.to.map("mul", total, SampleCount(1 / each, -correction / each, -1.0))
        return self._affine(total, 1 / (count - correction), 0.0)

    def std(self, x: Any, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Strided:
        return self.to.map("root", self.var(x, dim, correction=correction, keepdim=keepdim))

    def var_mean(
        self, x: Any, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
    ) -> tuple[Strided, Strided]:
        return self.var(x, dim, correction=correction, keepdim=keepdim), self.mean(x, dim, keepdim)

    def linalg_vector_norm(
        self, x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Strided:
        x = self._to_copy(x, dtype=dtype)
        if ord == 2:
            return self.to.map("root", self.sum(self.pow(x, 2), dim, keepdim))
        if ord == 1:
            return self.sum(self.to.map("abs", x), dim, keepdim)
        if ord == math.inf:
            return self.amax(self.to.map("abs", x), dim, keepdim)
        raise Unfusable(f"a norm of order {ord} is not fused; those of order 1, 2 and infinity are")

    def _weight_norm_interface(self, v: Any, g: Any, dim: int = 0) -> tuple[Strided, Strided]:
        x = self.to.strided(v)
        norm = self.linalg_vector_norm(x, 2, [d for d in range(len(x.axes)) if d != dim % len(x.axes)], True)
        return self.to.map("mul", x, self.to.map("div", g, norm)), norm

    def norm(self, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Strided:
        return self.linalg_vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)

    def _softmax(self, x: Any, dim: int, half_to_float: bool = False) -> Strided:
        return self._along("softmax", x, dim)

    def _safe_softmax(self, input: Any, dim: int, dtype: Any = None) -> Strided:
        """Zeros where all elements are -inf."""
        x = self.to.strided(self._to_copy(input, dtype=dtype))
        empty = self.to.map("eq", self.to.reduce("extreme", "amax", x, self._dims(x, dim), True), -math.inf)
        return self.to.map("where", empty, 0.0, self._softmax(self.to.map("where", empty, 0.0, x), dim))

    def _log_softmax(self, x: Any, dim: int, half_to_float: bool = False) -> Strided:
        return self._along("log_softmax", x, dim)

    def _along(self, kind: str, x: Any, dim: int) -> Strided:
        x = self.to.strided(x)
        return self.to.along(kind, x, dim % len(x.axes))

    def logsumexp(self, x: Any, dim: Any, keepdim: bool = False) -> Strided:
        x = self.to.strided(x)
        return self.to.log_of_sum(x, self._dims(x, dim), keepdim)

    # -- products -----------------------------------------------------------------------------------------------

    def mm(self, a: Any, b: Any) -> Strided:
        return self.addmm(None, a, b)

    def addmm(self, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Strided:
        if (beta, alpha) == (1, 1) and isinstance(b, Held) and not isinstance(a, (Held, Value)):
            mark = self.to.mark()
            try:
                return self._linear(self.to.strided(a), b, bias)
            except Unfusable:
                self.to.undo(mark)
        a, b = self.to.strided(a), self.to.strided(b)
        return self._plus(bias, beta, alpha, self.to.contract(a, b.permute([1, 0]), 0, 1))

    def _linear(self, x: Strided, weight: Held, bias: Any) -> Strided:
        """The product with a weight matrix: a linear layer of the last axis."""
        rows, x = self.to.rows(x, 1)
        _, out = weight.shape
        vector = bias if isinstance(bias, Held) and bias.shape == (out,) and bias.whole else None
        y = self.to.linear_of_features(rows, weight, vector)
        value = self.to.of_rows(y, x, 1, (out,))
        return value if bias is vector else self._plus(bias, 1, 1, value)

    def _plus(self, bias: Any, beta: float, alpha: float, product: Strided) -> Strided:
        if alpha != 1:
            product = self._affine(product, float(alpha), 0.0)
        return product if bias is None or beta == 0 else self.add(product, bias, alpha=beta)

    def bmm(self, a: Any, b: Any) -> Strided:
        a, b = self.to.strided(a), self.to.strided(b)
        return self.to.contract(a, b.permute([0, 2, 1]), 1, 1)

    def baddbmm(self, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Strided:
        return self._plus(bias, beta, alpha, self.bmm(a, b))

    def mv(self, a: Any, b: Any) -> Strided:
        return self.to.contract(self.to.strided(a), self.to.strided(b), 0, 1)

    dot = vdot = mv

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Strided:
        x = self.to.strided(input)
        flat = self.to.seen_as(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        weight = self.to.t(weight) if isinstance(weight, Held) and weight.whole else self.t(weight)
        return self.to.seen_as(self.addmm(bias, flat, weight), self.to.results[0])

    def _scaled_dot_product_flash_attention_for_cpu(
        self, query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, *,
        attn_mask: Any = None, scale: float | None = None,
    ) -> tuple[Strided, None]:  # fmt: skip
        """softmax(query key' scale + mask) value; 0 in a row that is masked out entirely."""
        q, k, v = self.to.strided(query), self.to.strided(key), self.to.strided(value)
        batch = len(q.axes) - 2
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        scores = self._affine(self.to.contract(q, k, batch, 1), factor, 0.0)
        if is_causal:
            below = torch.ones(scores.shape[-2:], dtype=torch.float64).tril()
            scores = self.to.map("where", self.to.literal(below), scores, -math.inf)
        if attn_mask is not None:
            scores = self.to.map("add", scores, attn_mask)
        softmax = self._softmax if attn_mask is None else self._safe_softmax
        weights = softmax(scores, len(scores.axes) - 1)
        order = [*range(batch), batch + 1, batch]
        return self.to.contract(weights, v.permute(order), batch, 1), None

    # -- normalisation ------------------------------------------------------------------------------------------

    def native_layer_norm(
        self, input: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float
    ) -> tuple[Strided, None, None]:
        """Over the trailing axes, whose elements are the features of rows."""
        x, axes = self.to.strided(input), len(shape)
        rows, x = self.to.rows(x, axes)
        features = math.prod(shape)
        affine: list[int | None] = []
        for p, what in ((weight, "weight"), (bias, "bias")):
            if p is not None and not (isinstance(p, Held) and p.whole and p.shape == tuple(shape)):
                raise Unfusable(f"its {what} is {text_of(p)}; fused is a tensor {list(shape)} of the model")
            affine.append(self.to.tensor(p, what))
        y = self.to.emit(
            "group_norm", [rows], (self.to.n, features), (features,), tuple(affine), eps=eps, groups=1,
            normalised=(features,),
        )  # fmt: skip
        return self.to.of_rows(y, x, axes, shape), None, None

    def _fused_rms_norm(self, input: Any, shape: Sequence[int], weight: Any, eps: float | None) -> tuple[Strided, None]:
        x, axes = self.to.strided(input), len(shape)
        dims = list(range(len(x.axes) - axes, len(x.axes)))
        mean = self.to.reduce("reduce", "mean", self.pow(x, 2), dims, True)
        eps = torch.finfo(self.to.dtype).eps if eps is None else eps
        y = self.mul(x, self.to.map("rsqrt", self._affine(mean, 1.0, eps)))
        return (y if weight is None else self.mul(y, weight)), None


def _function(name: str) -> Any:
    def method(self: Tensors, *operands: Any) -> Strided:
        return self.to.map(name, *operands)

    return method


for _name in (*_FUNCTIONS, *_COMBINATIONS):
    if _name not in vars(Tensors):
        setattr(Tensors, _name, _function(_name))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float))

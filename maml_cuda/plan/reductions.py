"""Operations over axes: sums, means, extremes, variances, norms, softmax. Methods have the names and signatures of ATen
operations.
"""

from __future__ import annotations

import math
from typing import Any

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.elementary import Elementary
from maml_cuda.plan.graph import SampleCount
from maml_cuda.plan.strided import Strided


class Reductions(Elementary):
    """Reads these operations."""

    def _dims(self, x: Strided, dim: Any) -> list[int]:
        given = range(len(x.axes)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        return [x.axis(d) for d in given] if x.axes else []

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
        norm = self.linalg_vector_norm(x, 2, [d for d in range(len(x.axes)) if d != x.axis(dim)], True)
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
        return self.to.along(kind, x, x.axis(dim))

    def logsumexp(self, x: Any, dim: Any, keepdim: bool = False) -> Strided:
        x = self.to.strided(x)
        return self.to.log_of_sum(x, self._dims(x, dim), keepdim)

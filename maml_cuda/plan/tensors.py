"""Operations on tensors of any shape: one method for each ATen operation, which writes layers over loops or a view.

They serve what the layers on features, signals and images (layers.py) do not. A method has the name and the signature
of the operation, and returns what the operation returns. This file has products and norms of trailing axes; the base
classes have views (tensor_views.py), functions of elements (elementary.py), reductions (reductions.py), sequences
(recurrences.py) and indices (indexing.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Held, Value, text_of
from maml_cuda.plan.indexing import Indexing
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.normalisations import Normalisations
from maml_cuda.plan.recurrences import Recurrences
from maml_cuda.plan.reductions import Reductions
from maml_cuda.plan.strided import Strided


class Tensors(Reductions, Normalisations, Recurrences, Indexing):
    """Reads operations on tensors of any shape, but for dropout and losses.

    Attributes:
        to: writes the graph.
    """

    def __init__(self, to: Layers) -> None:
        self.to = to

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

"""Operations of losses, and the derivatives by x that forward takes itself, on tensors of any shape.

Methods are as those of tensors.py. Class labels in a target are compared with the number of each class. A label that is
no class would not be seen there, so the labels are noted in `Sets.labels` and checked in every call.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.dropouts import Dropouts
from maml_cuda.plan.graph import Labels
from maml_cuda.plan.strided import Strided

NONE, MEAN, SUM = 0, 1, 2  # the reductions of ATen


class LossFunctions(Dropouts):
    """Reads operations of losses."""

    # -- of classes ---------------------------------------------------------------------------------------------

    def _is_class(self, labels: Any, classes: int, ignored: int | None = None) -> Strided:
        """[..., classes]: whether a label is a class."""
        given = self.to.strided(labels)
        if (leaf := self.to.leaf_of(given)) is None:
            raise Unfusable("its labels are no part of the target")
        self.to.labels.append(Labels(leaf, classes, ignored))
        return self.to.map("eq", given.unsqueeze(len(given.axes)), self._numbers(classes))

    def _numbers(self, count: int) -> Strided:
        return self.to.literal(torch.arange(count, dtype=torch.float64))

    def one_hot(self, labels: Any, num_classes: int = -1) -> Strided:
        if num_classes < 0:
            raise Unfusable("one_hot without a number of classes is not fused")
        given = self.to.strided(labels)
        if self.to.leaf_of(given) is not None:
            return self._is_class(labels, num_classes)
        index = self._index(given, num_classes)
        return self.to.map("eq", index.unsqueeze(len(index.axes)), self._numbers(num_classes))

    def gather(self, x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Strided:
        """The values at class labels, which are along the last axis; at any other index as `Indexing.gather`."""
        values, chosen = self.to.strided(x), self.to.strided(index)
        last = len(values.axes) - 1
        if self.to.leaf_of(chosen) is None or values.axis(dim) != last or chosen.shape[:-1] != values.shape[:-1]:
            return super().gather(x, dim, index)
        of_class = self._is_class(chosen, values.shape[-1])
        return self.sum(self.to.map("where", of_class, values.unsqueeze(last), 0.0), [-1])

    def nll_loss_forward(
        self, input: Any, target: Any, weight: Any, reduction: int, ignore_index: int
    ) -> tuple[Strided, Strided]:
        """input [n, classes], or [n, classes, ...] with labels [n, ...]."""
        x = self.to.strided(input)
        x = x.permute([0, *range(2, len(x.axes)), 1]) if len(x.axes) > 1 else x
        classes = x.shape[-1]
        of_class = self._is_class(target, classes, ignore_index)
        if 0 <= ignore_index < classes:
            counts = (torch.arange(classes) != ignore_index).to(torch.float64)
            of_class = self.to.map("mul", of_class, self.to.literal(counts))
        weights = of_class if weight is None else self.to.map("mul", of_class, weight)
        terms = self.neg(self.sum(self.to.map("where", of_class, self.to.map("mul", x, weights), 0.0), [-1]))
        total = self.sum(weights)
        if reduction == NONE:
            return terms, total
        value = self.sum(terms)
        if reduction == MEAN:  # NaN without a derivative where all labels are ignored
            empty = self.to.map("eq", total, 0.0)
            mean = self.to.map("div", value, self.masked_fill(total, empty, 1.0))
            value = self.masked_fill(mean, empty, math.nan)
        return value, total

    nll_loss2d_forward = nll_loss_forward

    # -- of differences -----------------------------------------------------------------------------------------

    def _reduced(self, terms: Strided, reduction: int) -> Strided:
        return terms if reduction == NONE else self.mean(terms) if reduction == MEAN else self.sum(terms)

    def mse_loss(self, input: Any, target: Any, reduction: int = MEAN) -> Strided:
        return self._reduced(self.pow(self.sub(input, target), 2), reduction)

    def huber_loss(self, input: Any, target: Any, reduction: int = MEAN, delta: float = 1.0) -> Strided:
        """d^2 / 2 where |d| < delta, otherwise delta (|d| - delta / 2)."""
        d = self.sub(input, target)
        size = self.to.map("abs", d)
        square, line = self.mul(self.pow(d, 2), 0.5), self._affine(size, delta, -delta * delta / 2)
        return self._reduced(self.to.map("where", self.to.map("lt", size, delta), square, line), reduction)

    def smooth_l1_loss(self, input: Any, target: Any, reduction: int = MEAN, beta: float = 1.0) -> Strided:
        """The Huber loss over beta."""
        if beta == 0:
            return self._reduced(self.to.map("abs", self.sub(input, target)), reduction)
        return self._affine(self.huber_loss(input, target, reduction, beta), 1 / beta, 0.0)

    def binary_cross_entropy_with_logits(
        self, input: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = MEAN
    ) -> Strided:
        """(1 - t) x - (1 + (p - 1) t) log sigmoid(x), for x of any size."""
        negative = self.to.map("mul", self._affine(target, -1.0, 1.0), input)
        log = self.to.map("log_sigmoid", input)
        if pos_weight is not None:
            more = self.to.map("mul", self._affine(pos_weight, 1.0, -1.0), target)
            log = self.to.map("mul", self._affine(more, 1.0, 1.0), log)
        terms = self.to.map("sub", negative, log)
        return self._reduced(terms if weight is None else self.to.map("mul", terms, weight), reduction)

    def cosine_similarity(self, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Strided:
        """x1 x2 / (|x1| |x2|), with norms of at least eps. As in torch, this bound has no part in the derivative."""
        a, b = self.to.strided(x1), self.to.strided(x2)
        product = self.sum(self.to.map("mul", a, b), [dim])
        return self.to.map("div", product, self.to.map("mul", self._norm(a, dim, eps), self._norm(b, dim, eps)))

    def _norm(self, x: Strided, dim: int, eps: float) -> Strided:
        norm = self.linalg_vector_norm(x, 2, [dim])
        return self.to.map("add", norm, self.to.stop(self.to.map("sub", self.clamp_min(norm, eps), norm)))

    def soft_margin_loss(self, input: Any, target: Any, reduction: int = MEAN) -> Strided:
        """log(1 + exp(-t x))"""
        return self._reduced(self.neg(self.to.map("log_sigmoid", self.to.map("mul", target, input))), reduction)

    def binary_cross_entropy(self, input: Any, target: Any, weight: Any = None, reduction: int = MEAN) -> Strided:
        """-t log p - (1 - t) log(1 - p), with logarithms of at least -100."""
        yes = self.clamp_min(self.to.map("log", input), -100)
        no = self.clamp_min(self.to.map("log1p", self.neg(input)), -100)
        terms = self.neg(self.add(self.mul(target, yes), self.mul(self._affine(target, -1.0, 1.0), no)))
        return self._reduced(terms if weight is None else self.mul(terms, weight), reduction)

    # -- derivatives that forward takes by torch.autograd.grad(create_graph=True) --------------------------------

    def tanh_backward(self, g: Any, y: Any) -> Strided:
        return self.to.map("mul", g, self._affine(self.pow(y, 2), -1.0, 1.0))

    def sigmoid_backward(self, g: Any, y: Any) -> Strided:
        return self.to.map("mul", g, self.to.map("sub", y, self.pow(y, 2)))

    def threshold_backward(self, g: Any, x: Any, threshold: float) -> Strided:
        return self.to.map("where", self.to.map("gt", x, threshold), g, 0.0)

    def leaky_relu_backward(self, g: Any, x: Any, slope: float, of_result: bool) -> Strided:
        return self.to.map("where", self.to.map("gt", x, 0.0), g, self._affine(g, slope, 0.0))

    def silu_backward(self, g: Any, x: Any) -> Strided:
        p = self.to.map("sigmoid", x)
        slope = self.to.map("add", p, self.to.map("mul", x, self.to.map("sub", p, self.pow(p, 2))))
        return self.to.map("mul", g, slope)

    def softplus_backward(self, g: Any, x: Any, beta: float, threshold: float) -> Strided:
        slope = self.to.map("sigmoid", self._affine(x, beta, 0.0))
        linear = self.to.map("gt", x, threshold / beta)
        return self.to.map("where", linear, g, self.to.map("mul", g, slope))

    def gelu_backward(self, g: Any, x: Any, *, approximate: str = "none") -> Strided:
        if approximate != "none":
            raise Unfusable("the derivative of gelu's approximation by tanh is not fused")
        cdf = self._affine(self.to.map("erf", self._affine(x, math.sqrt(0.5), 0.0)), 0.5, 0.5)
        pdf = self.to.map("exp", self._affine(self.pow(x, 2), -0.5, -0.5 * math.log(2 * math.pi)))
        return self.to.map("mul", g, self.to.map("add", cdf, self.to.map("mul", x, pdf)))

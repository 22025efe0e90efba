"""Functions of torch by their formulas, where torch's own code cannot be differentiated twice or captured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Formulas(TorchFunctionMode):
    """Computes functions of torch by formulas.

    Args:
        formulas: function -> formula, which takes the same arguments. One that returns NotImplemented leaves these
            arguments to torch.

    Attributes:
        met: whether any of these functions has been called.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._formulas = formulas
        self.met = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        formula, kwargs = self._formulas.get(function), kwargs or {}
        if formula is None:
            return function(*args, **kwargs)
        self.met = True
        result = formula(*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The second derivative of torch's own kernel takes the norms for constants: torch.autograd.gradgradcheck fails in
    torch 2.6, 2.13 and 2.14."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _batch_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The gradient of torch's own kernel on a CPU is wrong on some views that have an axis of size 1, such as the
    permutation of [n, 3, 1, 4] to [n, 4, 1, 3]. torch.autograd.gradcheck fails in torch 2.6, 2.13 and 2.14."""
    if 1 in input.shape and not input.is_contiguous():
        input = input.clone(memory_format=torch.contiguous_format)
    return F.batch_norm(input, *args, **kwargs)


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
) -> Any:
    """The mean over classes i, other than the target y, of max(0, margin - x_y + x_i)^p. torch has no second derivative
    of its own kernel."""
    if size_average is not None or reduce is not None:
        return NotImplemented
    classes = input.shape[-1]
    of_class = F.one_hot(target, classes).to(input.dtype)
    terms = (margin - (input * of_class).sum(-1, keepdim=True) + input).relu() ** p * (1 - of_class)
    if weight is not None:
        terms = terms * (of_class * weight).sum(-1, keepdim=True)
    return _reduced(terms.sum(-1) / classes, reduction)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Any:
    """torch has no second derivative of its own kernel."""
    return NotImplemented if inplace else F.relu6(input + 3) / 6


def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Any:
    """Draws no random numbers in eval mode, although torch's own code might."""
    return NotImplemented if training or inplace else F.leaky_relu(input, (lower + upper) / 2)


def _smoothed_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """With weights and label smoothing: torch's own code selects samples by their labels."""
    if weight is None or not label_smoothing or target.is_floating_point() or input.dim() == 1:
        return NotImplemented
    log = input.log_softmax(1)
    classes = log.shape[1]

    def of_target(values: Tensor, weight: Tensor | None) -> Tensor:
        return F.nll_loss(-values, target, weight, ignore_index=ignore_index, reduction="none")

    one = torch.ones_like(log)
    counts = of_target(one, None)
    smooth = -(log * weight.view(-1, *[1] * (log.dim() - 2))).sum(1) * counts
    terms = (label_smoothing - 1) * of_target(log, weight) + label_smoothing / classes * smooth
    if reduction != "mean":
        return _reduced(terms, reduction)
    total = of_target(one, weight).sum()
    empty = total == 0  # all labels are ignored
    return (terms.sum() / total.masked_fill(empty, 1)).masked_fill(empty, math.nan)


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """torch's own code looks for a negative variance and raises; here the loss is NaN."""
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    if var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    bounded = var + (var.clamp_min(eps) - var).detach()  # the bound has no part in the derivative
    bounded = bounded.masked_fill(var < 0, math.nan)
    terms = 0.5 * (bounded.log() + (input - target) ** 2 / bounded)
    return _reduced(terms + 0.5 * math.log(2 * math.pi) if full else terms, reduction)


def _triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The distance is a function of the user's own, whose calls of torch are captured one by one."""
    distance = distance_function or F.pairwise_distance
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    return _reduced((margin + near - far).clamp_min(0), reduction)


def _padded(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Circular padding: torch's own code writes to parts of a tensor."""
    if mode != "circular":
        return NotImplemented
    x = input
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        d = x.dim() - 1 - i
        x = x.narrow(d, max(-before, 0), x.shape[d] - max(-before, 0) - max(-after, 0))
        size = x.shape[d]
        if max(before, after) > size:
            return NotImplemented
        last = [x.narrow(d, size - before, before)] if before > 0 else []
        first = [x.narrow(d, 0, after)] if after > 0 else []
        x = torch.cat([*last, x, *first], d)
    return x


def _reduced(terms: Tensor, reduction: str) -> Tensor:
    return terms.mean() if reduction == "mean" else terms.sum() if reduction == "sum" else terms


# For functions of torch whose first or second derivative is wrong or missing.
DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.batch_norm: _batch_norm,
    F.multi_margin_loss: _multi_margin_loss,
    F.hardsigmoid: _hardsigmoid,
}
# What the graphs of these functions have where torch's own code computes them, in every version that has it.
THEIR_NODES: frozenset[Any] = frozenset(
    getattr(torch._C._functions, name)
    for name in dir(torch._C._functions)
    if re.fullmatch(r"\w*BatchNorm\w*|WeightNorm\w*|MultiMarginLoss\w*|Hardsigmoid\w*", name)
)
# For functions of torch whose own code cannot be recorded (capture/recorder.py).
CAPTURED: dict[Any, Callable[..., Any]] = {
    F.multi_margin_loss: _multi_margin_loss,
    F.pad: _padded,
    F.rrelu: _rrelu,
    F.cross_entropy: _smoothed_cross_entropy,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.triplet_margin_with_distance_loss: _triplet_margin_with_distance_loss,
}

"""Fast path: a meta-step that skips torch's dispatcher when nothing can observe it, and autograd's engine where its
gradient goes to `.grad` alone. Each takes as long as the meta-step of a small network.

It runs calls with data like those of an earlier call, which has passed every check. The results are the same bits.

With almost nothing to compute, a call and its `loss.backward()` still spend more than half of their time in autograd's
engine: an empty autograd.Function over as many parameters takes as long. `maml.backward` does without.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from maml_cuda import torch_private
from maml_cuda.engine import ops
from maml_cuda.engine.autograd import once
from maml_cuda.engine.problem import Problem

Place = tuple[torch.Size, tuple[int, ...], int]  # shape, strides and first element of a part of a flat tensor


def is_plain(t: Any) -> bool:
    """Whether it is of torch's own types, no subclass, and its memory holds its values (it is no lazy negation, and no
    zero without memory)."""
    return (type(t) is Tensor or type(t) is torch.nn.Parameter) and not (t.is_neg() or t._is_zerotensor())


def places(tensors: list[Tensor]) -> list[Place]:
    """The places of tensors in a flat one that holds them all, one after the other."""
    ends = itertools.accumulate(t.numel() for t in tensors)
    strides = [torch.empty(t.shape, device="meta").stride() for t in tensors]
    return [(t.shape, s, end - t.numel()) for t, s, end in zip(tensors, strides, ends, strict=True)]


def meta_step(
    problem: Problem, parameters: list[Tensor], rates: list[Tensor], data: tuple[Tensor, ...],
    task_weights: Tensor | None, steps: int, gradient: bool, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op meta_gradient on `data` (x_spt, y_spt, x_qry, y_qry), which have been checked."""
    x_spt, y_spt, x_qry, y_qry = [t.contiguous() for t in data]
    if task_weights is not None:
        task_weights = task_weights.resolve_neg()
    support, query = [x_spt, y_spt, None, None], [x_qry, y_qry, None, None]
    return ops.meta_step(problem, parameters, rates, support, query, task_weights, None, steps, gradient, seed)


class _Attached(torch.autograd.Function):
    """autograd.attach for a loss that is not held elsewhere, so that it need not be copied, and with known places."""

    @staticmethod
    def forward(ctx: Any, held: tuple[Tensor, Tensor, list[Place]], *inputs: Tensor) -> Tensor:
        loss, flat, places = held
        ctx.save_for_backward(flat)
        ctx.known = inputs, places
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        inputs, places = ctx.known
        part = flat.mul(grad).as_strided
        return (None, *once("a meta-gradient", [part(*place) for place in places], [grad, *inputs]))


_apply_attached = torch_private.direct_apply(_Attached)


def attached(loss: Tensor, flat: Tensor, inputs: list[Tensor], places: list[Place]) -> Tensor:
    """The op attach without the dispatcher, for a loss that is not held elsewhere; `places` of the inputs in `flat`."""
    return _apply_attached((loss, flat, places), *inputs)  # type: ignore[no-any-return]


def only_adds(t: Tensor) -> bool:
    """Whether autograd would only add a gradient of t to `.grad`, and t is dense, as its place is."""
    return t.is_leaf and t.is_contiguous() and not t._backward_hooks and not t._post_accumulate_grad_hooks


def add_gradient(flat: Tensor, inputs: list[Tensor], places: list[Place]) -> None:
    """What the backward of `attached` does where autograd only adds to `.grad`."""
    part = flat.as_strided
    grads: list[Tensor] = []
    added: list[Tensor] = []
    for t, place in zip(inputs, places, strict=True):
        grad = t.grad
        if grad is None:
            t.grad = part(*place)
        else:
            grads.append(grad)
            added.append(part(*place))
    if grads:
        with torch.no_grad():
            torch_private.add_each(grads, added)

"""Fast path: a meta-step that skips torch's dispatcher when nothing can observe it, and autograd's engine where its
gradient goes to `.grad` alone. Each takes as long as the meta-step of a small network.

It runs calls with data like those of an earlier call, which has passed every check. The results are the same bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from maml_cuda.engine import ops
from maml_cuda.engine.autograd import once
from maml_cuda.engine.problem import Problem

Place = tuple[torch.Size, tuple[int, ...], int]  # shape, strides and first element of a part of a flat tensor


def is_plain(t: Any) -> bool:
    """Whether it is a tensor of torch's own, and its memory holds what it says."""
    return (type(t) is Tensor or type(t) is torch.nn.Parameter) and not (t.is_neg() or t._is_zerotensor())


def places(tensors: list[Tensor]) -> list[Place]:
    """Where each of the tensors stands in one that holds them all, one after the other."""
    ends = itertools.accumulate(t.numel() for t in tensors)
    strides = [torch.empty(t.shape, device="meta").stride() for t in tensors]
    return [(t.shape, s, end - t.numel()) for t, s, end in zip(tensors, strides, ends, strict=True)]


def meta_step(
    problem: Problem, parameters: list[Tensor], rates: list[Tensor], data: tuple[Tensor, ...],
    task_weights: Tensor | None, steps: int, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op meta_gradient on `data` (x_spt, y_spt, x_qry, y_qry), which have been checked."""
    x_spt, y_spt, x_qry, y_qry = [t.contiguous() for t in data]
    if task_weights is not None:
        task_weights = task_weights.resolve_neg()
    support, query = [x_spt, y_spt, None, None], [x_qry, y_qry, None, None]
    return ops.meta_step(problem, parameters, rates, support, query, task_weights, None, steps, gradient)


class _Attached(torch.autograd.Function):
    """The same for a loss that nobody else holds, so that it need not be copied, and with known places."""

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


def attached(loss: Tensor, flat: Tensor, inputs: list[Tensor], places: list[Place]) -> Tensor:
    """The op attach, past the dispatcher, on a fresh loss; `places` of the inputs in `flat`."""
    return _Attached.apply((loss, flat, places), *inputs)  # type: ignore[no-any-return,no-untyped-call]


def only_adds(t: Tensor) -> bool:
    """Whether all that autograd does with a gradient of t is to add it to `.grad`, and t is laid out as its place."""
    return t.is_leaf and t.is_contiguous() and not t._backward_hooks and not t._post_accumulate_grad_hooks


def add_gradient(flat: Tensor, inputs: list[Tensor], places: list[Place]) -> None:
    """What the backward of `attached` comes to where all that autograd does is to add."""
    part = flat.as_strided
    for t, place in zip(inputs, places, strict=True):
        grad = t.grad
        if grad is None:
            t.grad = part(*place)
        else:
            with torch.no_grad():
                grad += part(*place)

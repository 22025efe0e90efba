"""The ops that have a backward: `attach`, `adapt` and `predict`.

Each is one node of autograd's graph. Its backward is one op of ops.py, which cannot be differentiated again, so that no
graph of the inner loop is ever made.

    attach     the loss of a meta-step, whose backward gives the flat gradient of meta_gradient
    adapt      adapt_forward, whose backward is one Hessian-vector product a step
    predict    predict_forward
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maml_cuda.engine import padding
from maml_cuda.engine.data_parts import slopes, split
from maml_cuda.engine.ops import LIBRARY
from maml_cuda.engine.padding import TargetList
from maml_cuda.engine.problem import cut, is_double, problem_of
from maml_cuda.plan.schema import plan_of


class _Once(torch.autograd.Function):
    """The identity, with the inputs that the gradients depend on as further inputs, so that a second backward raises
    instead of losing terms."""

    @staticmethod
    def forward(ctx: Any, count: int, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"the gradient of {ctx.what} cannot be differentiated again {_WHY[ctx.what]}")


_WHY = {
    "a meta-gradient": '(that is third order in the model); backend="reference" with a hand-written loop can',
    "adapt": '(that is third order in the model); that of backend="reference" can',
    "predict": "(that is second order in the model); hvp gives products with the Hessian of the loss, and the gradient "
    'of predict with backend="reference" can be differentiated',
}


def once(what: str, grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients. Where autograd records this backward (create_graph=True), they have a node that raises."""
    if not torch.is_grad_enabled():
        return grads
    return list(_Once.apply(len(grads), what, *grads, *inputs))  # type: ignore[no-untyped-call]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, flat: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.inputs = inputs  # for their shapes and for `once`; an optimizer may change their values before the backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        grads = cut(flat.mul(grad), ctx.inputs)
        return (None, None, *once("a meta-gradient", grads, [grad, *ctx.inputs]))


LIBRARY.define("attach(Tensor loss, Tensor flat, Tensor[] inputs) -> Tensor")


def _attach(loss: Tensor, flat: Tensor, inputs: list[Tensor]) -> Tensor:
    """`loss`, whose gradient by the concatenation of `inputs` is `flat`."""
    return _Attach.apply(loss, flat, *inputs)  # type: ignore[no-any-return,no-untyped-call]


LIBRARY.impl("attach", _attach, "CompositeImplicitAutograd")


def _saved(t: Tensor | None) -> Tensor | None:
    """t as autograd can save it: a copy of a tensor made in inference mode."""
    return t.clone() if t is not None and t.is_inference() else t


def support_gradient(slopes: Tensor, weights: Tensor) -> Tensor:
    """The gradient in the weights of support samples [tasks, n], from their slopes, the sums over inner steps of
    <g_i, z_dot_i>: g_i is the cotangent of the loss at sample i's prediction, and z_dot_i the tangent of that along
    d = rate times v.

    With W the sum of a task's weights, an inner gradient is sum_i w_i grad l_i / W. Its derivative in w_i is
    (grad l_i - the inner gradient) / W, and that along -d is -(slope_i / w_i - the sum of slopes / W).
    """
    slopes = slopes.view_as(weights)
    counts = weights > 0
    gradient = slopes.sum(1, keepdim=True) / weights.sum(1, keepdim=True) - slopes / torch.where(counts, weights, 1)
    return torch.where(counts, gradient, 0)


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: str,
        steps: int,
        first_order: bool,
        parameters: int,
        x: Tensor,
        first_of_y: Tensor,
        rest_of_y: TargetList,
        weights: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call = plan, steps, first_order, parameters, seed
        y = [first_of_y, *rest_of_y, *([] if weights is None else [weights])]
        ctx.fields = len(y)
        ctx.save_for_backward(*map(_saved, (x, *y, *tensors)))
        fast, support_losses = torch.ops.maml_cuda.adapt_forward(
            tensors[:parameters], tensors[parameters:], x, y, plan, steps, seed
        )
        ctx.mark_non_differentiable(support_losses)
        return (*fast, support_losses)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        plan, steps, first_order, count, seed = ctx.call
        x, *tensors = ctx.saved_tensors
        y, tensors = tensors[: ctx.fields], tensors[ctx.fields :]
        flat, data = torch.ops.maml_cuda.adapt_backward(
            tensors[:count], tensors[count:], x, y, list(cotangents[:-1]), plan, steps, first_order, seed
        )
        has_gradient = plan_of(plan).has_gradient
        wanted = [t for t, yes in zip(tensors, has_gradient, strict=True) if yes]
        found, inputs, of_data = cut(flat, wanted), [*cotangents[:-1], *wanted], plan_of(plan).data_gradient
        if of_data:
            problem = problem_of(
                plan, "adapt_backward", tuple(x.shape[2:]), x.shape[1], 0, steps, first_order, is_double(x),
                *padding.of_problem(y),
            )  # fmt: skip
            found += [grad for _, grad in split(problem, data, [x, y], None, None, (), mean=False)]
            if "spt_weights" in of_data:
                found.append(support_gradient(slopes(problem, data, y[1].shape[1]), y[1]))
            given = {"x_spt": x, "y_spt": y[0], "spt_weights": y[-1]}
            inputs += [given[name] for name in of_data]
        grads = once("adapt", found, inputs)
        first = len(wanted)
        of = dict(zip(of_data, grads[first:], strict=True))
        rest = iter(grads[:first])
        return (
            *(None,) * 4, of.get("x_spt"), of.get("y_spt"), None, of.get("spt_weights"), None,
            *(next(rest) if yes else None for yes in has_gradient),
        )  # fmt: skip


LIBRARY.define(
    "adapt(Tensor[] parameters, Tensor[] rates, Tensor x, Tensor?[] y, str plan, int steps, bool first_order, "
    "Tensor? seed=None) -> (Tensor[], Tensor)"
)


def _adapt(
    parameters: list[Tensor],
    rates: list[Tensor],
    x: Tensor,
    y: TargetList,
    plan: str,
    steps: int,
    first_order: bool,
    seed: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    y, weights = (y[:1], y[1]) if len(y) == 2 else (y, None)
    *fast, support_losses = _Adapt.apply(  # type: ignore[no-untyped-call]
        plan, steps, first_order, len(parameters), x, y[0], y[1:], weights, seed, *parameters, *rates
    )
    return fast, support_losses


LIBRARY.impl("adapt", _adapt, "CompositeImplicitAutograd")


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: str, x: Tensor, seed: Tensor | None, counts: Tensor | None, *fast: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.plan, ctx.seed, ctx.counts = plan, seed, counts
        ctx.save_for_backward(*map(_saved, (x, *fast)))
        prediction: Tensor = torch.ops.maml_cuda.predict_forward(fast, x, plan, seed, counts)
        return prediction

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, *fast = ctx.saved_tensors
        grads = torch.ops.maml_cuda.predict_backward(fast, x, cotangent, ctx.plan, ctx.seed, ctx.counts)
        return (None, None, None, None, *once("predict", grads, [cotangent, *fast]))


LIBRARY.define("predict(Tensor[] fast, Tensor x, str plan, Tensor? seed=None, Tensor? counts=None) -> Tensor")


def _predict(
    fast: list[Tensor], x: Tensor, plan: str, seed: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    return _Predict.apply(plan, x, seed, counts, *fast)  # type: ignore[no-any-return,no-untyped-call]


LIBRARY.impl("predict", _predict, "CompositeImplicitAutograd")

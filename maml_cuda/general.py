"""The general path of FusedMAML: reference.py behind the checks that the fused ops make themselves.

Every call here runs outside autocast (the model's own dtype, as on the fused path), outside inference mode (the inner
loop needs gradients) and outside torch.compile (double backward cannot be compiled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import data_checks, reference, targets
from .batch_norm import at_step
from .functional import Functional, differentiable_twice
from .losses import Loss, loss_function
from .policies import Policy, mean_of
from .rates import Rate
from .targets import PolicyTarget, Target

P = ParamSpec("P")
R = TypeVar("R")


def _apart(call: Callable[P, R]) -> Callable[P, R]:
    @wraps(call)
    def apart(*args: P.args, **kwargs: P.kwargs) -> R:
        gradients = torch.is_grad_enabled()
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.set_grad_enabled(gradients))
            return call(*map(_plain, args), **{name: _plain(a) for name, a in kwargs.items()})  # type: ignore[arg-type]

    return torch.compiler.disable(apart)  # type: ignore[return-value]


def _plain(argument: object) -> object:
    """An inference tensor as an ordinary one; everything else as it is."""
    if isinstance(argument, Tensor):
        return argument.clone() if argument.is_inference() else argument
    if isinstance(argument, dict):
        return {name: _plain(value) for name, value in argument.items()}
    return targets.mapped(_plain, argument) if isinstance(argument, PolicyTarget) else argument  # type: ignore[arg-type]


@_apart
def meta_step(
    model: nn.Module,
    loss: Loss,
    rates: Mapping[str, Rate],
    parameters: Iterable[Tensor],
    x_spt: Tensor,
    y_spt: Target,
    x_qry: Tensor,
    y_qry: Target,
    steps: int,
    first_order: bool,
    task_weights: Tensor | None,
    query_weights: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """loss, task_losses, logits, support_losses, and (tensor, gradient) of each of `parameters` and of the data that
    requires grad and reaches the loss; none where gradients are off."""
    _check_target(model, loss, None, "y_spt", x_spt, y_spt)
    _check_target(model, loss, None, "y_qry", x_qry, y_qry)
    data = [x_spt, *targets.tensors(y_spt), x_qry, *targets.tensors(y_qry)]
    given = {id(t): t for t in (*parameters, *data) if t is not None}  # one tensor may be support and query
    wanted = [t for t in given.values() if t.requires_grad and torch.is_grad_enabled()]
    weights = [1 / len(x_spt)] * len(x_spt) if task_weights is None else list(task_weights)
    function = Functional(model)
    *outputs, gradients = reference.meta_step(
        function, loss_function(loss), rates, wanted, x_spt, y_spt, x_qry, y_qry, steps, first_order, weights,
        query_weights,
    )  # fmt: skip
    if torch.is_grad_enabled():
        function.keep_buffers()
    reached = [(t, g.detach()) for t, g in zip(wanted, gradients, strict=True) if g is not None]
    return (*outputs, reached)  # type: ignore[return-value]


@_apart
def adapt(
    model: nn.Module,
    loss: Loss,
    rates: Mapping[str, Rate],
    x: Tensor,
    y: Target,
    steps: int,
    first_order: bool,
    differentiable: bool,
) -> dict[str, Tensor]:
    """The adapted parameters, name -> [tasks, *shape]."""
    _check_target(model, loss, None, "y_spt", x, y)
    theta = {name: p.view_as(p) for name, p in model.named_parameters()}  # whose hooks see the outer gradient alone
    function = Functional(model)
    tasks = [
        reference.inner_loop(
            function, loss_function(loss), theta, rates, x[t], targets.of_task(y, t), steps, first_order, differentiable
        )[0][-1]
        for t in range(len(x))
    ]
    adapted = {name: torch.stack([phi[name] for phi in tasks]) for name in rates}
    return adapted if differentiable else {name: p.detach() for name, p in adapted.items()}


@_apart
def predict(model: nn.Module, fast: Mapping[str, Tensor], x: Tensor, slot: int) -> Policy:
    function = Functional(model)
    differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in fast.values())
    with at_step(model, slot), differentiable_twice() if differentiable else nullcontext():
        predictions = [function({n: p[t] for n, p in fast.items()}, x[t]) for t in range(len(x))]
    if isinstance(predictions[0], Tensor):
        return torch.stack(predictions)
    return tuple(torch.stack(parts) for parts in zip(*predictions, strict=True))  # type: ignore[return-value]


@_apart
def loss_and_grad(
    model: nn.Module, loss: Loss, fast: Mapping[str, Tensor], names: list[str], x: Tensor, y: Target,
    slot: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    _check_target(model, loss, fast, "y", x, y)
    with at_step(model, slot):
        return reference.loss_and_grad(Functional(model), loss_function(loss), fast, names, x, y)


@_apart
def hvp(
    model: nn.Module,
    loss: Loss,
    fast: Mapping[str, Tensor],
    names: list[str],
    x: Tensor,
    y: Target,
    v: Mapping[str, Tensor],
    slot: int,
) -> dict[str, Tensor]:
    _check_target(model, loss, fast, "y", x, y)
    with at_step(model, slot):
        return reference.hvp(Functional(model), loss_function(loss), fast, names, x, y, v)


@_apart
def fisher_vector_product(
    model: nn.Module,
    loss: str,
    rates: Mapping[str, Rate],
    names: list[str],
    x_spt: Tensor,
    y_spt: Target,
    x_qry: Tensor,
    v: Mapping[str, Tensor],
    weights: Tensor | None,
    steps: int,
    first_order: bool,
) -> dict[str, Tensor]:
    """By `names`."""
    _check_target(model, loss, None, "y_spt", x_spt, y_spt)
    if weights is None:
        weights = x_qry.new_ones(x_qry.shape[:2])
    data_checks.sample_weights("weights", weights)
    return reference.fisher_vector_product(
        Functional(model), loss_function(loss), rates, names, x_spt, y_spt, x_qry, v, targets.shares(weights), steps,
        first_order,
    )  # fmt: skip


def _check_target(
    model: nn.Module, loss: Loss, fast: Mapping[str, Tensor] | None, name: str, x: Tensor, y: Target
) -> None:
    """What the model returns, and that the target fits it, against one forward of the first task that draws no random
    number."""
    if not isinstance(loss, str):
        return
    parameters = dict(model.named_parameters()) if fast is None else {n: p[0] for n, p in fast.items()}
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        prediction = Functional(model)(parameters, x[0])
    data_checks.prediction(loss, prediction)
    data_checks.target(name, loss, y, tuple(mean_of(prediction).shape[1:]))
    data_checks.target_values(name, y, mean_of(prediction).shape[-1] if loss in data_checks.OF_CLASSES else None)

"""Meta-steps by plain torch: a loop of autograd over the tasks, and torch.func's vmap.

A builder returns a step: a function without arguments that writes the meta-gradient, the mean over tasks, to the
parameters' `.grad`. Each baseline is the fastest exact variant of its method that we know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

Step = Callable[[], None]
Parameters = dict[str, Tensor]

LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


class Setting(Protocol):
    """What a baseline must know beside the model and the data: `loss` is a name in LOSSES."""

    @property
    def loss(self) -> str: ...
    @property
    def tasks(self) -> int: ...
    @property
    def inner_steps(self) -> int: ...
    @property
    def inner_lr(self) -> float: ...


def clear(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def descend(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], rate: float) -> Parameters:
    """One SGD step out of place, `p - rate * g`, as one operation per parameter."""
    return {name: torch.sub(p, grads[name], alpha=rate) for name, p in params.items()}


def autograd_loop(setting: Setting, model: nn.Module, tasks: Sequence[Tensor], first_order: bool) -> Step:
    """A loop over tasks. Each backward pass runs before the next task, so that only one graph exists at a time.

    Images are in NCHW layout; channels last was not faster on two x86-64 cores. First order builds no graph of the
    inner gradients, so that the parameters are reached through the subtractions only.
    """
    loss = LOSSES[setting.loss]
    params = trainable(model)
    parameters = list(params.values())

    def step() -> None:
        clear(parameters)
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            fast: Mapping[str, Tensor] = params
            for _ in range(setting.inner_steps):
                support_loss = loss(functional_call(model, dict(fast), (x_spt,)), y_spt)
                grads = torch.autograd.grad(support_loss, list(fast.values()), create_graph=not first_order)
                fast = descend(fast, dict(zip(fast, grads, strict=True)), setting.inner_lr)
            query_loss = loss(functional_call(model, dict(fast), (x_qry,)), y_qry)
            (query_loss / setting.tasks).backward()

    return step


def mean_gradient(setting: Setting, model: nn.Module, first_order: bool) -> Callable[..., Parameters]:
    """A function from `(parameters, *tasks)` to the meta-gradient: `vmap(grad(task))`, then the mean over tasks.

    The order matters: `grad` of a vmapped mean, as in PyTorch's own example, silently gives wrong gradients with
    BatchNorm (seen with torch 2.13).
    """
    loss = LOSSES[setting.loss]

    def task_loss(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x,)), y)

    def adapt(params: Parameters, x_spt: Tensor, y_spt: Tensor) -> Parameters:
        for _ in range(setting.inner_steps):
            params = descend(params, grad(task_loss)(params, x_spt, y_spt), setting.inner_lr)
        return params

    def adapted_loss(params: Parameters, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Tensor:
        return task_loss(adapt(params, x_spt, y_spt), x_qry, y_qry)

    def second_order(params: Parameters, *task: Tensor) -> Parameters:
        found: Parameters = grad(adapted_loss)(params, *task)
        return found

    def first_order_only(params: Parameters, *task: Tensor) -> Parameters:
        x_spt, y_spt, x_qry, y_qry = task
        found: Parameters = grad(task_loss)(adapt(params, x_spt, y_spt), x_qry, y_qry)
        return found

    of_task = first_order_only if first_order else second_order
    task_grads = vmap(of_task, in_dims=(None, 0, 0, 0, 0), randomness="different")

    def mean(params: Parameters, *tasks: Tensor) -> Parameters:
        return {name: grads.mean(0) for name, grads in task_grads(params, *tasks).items()}

    return mean


def func_vmap(setting: Setting, model: nn.Module, tasks: Sequence[Tensor], first_order: bool) -> Step:
    """torch.func: vmap over tasks."""
    return step_of(mean_gradient(setting, model, first_order), model, tasks)


def step_of(gradient: Callable[..., Parameters], model: nn.Module, tasks: Sequence[Tensor]) -> Step:
    """A step that assigns the result of `gradient` to the parameters' `.grad`."""
    parameters = list(trainable(model).values())
    params = {name: p.detach() for name, p in trainable(model).items()}

    def step() -> None:
        clear(parameters)
        for p, grad_p in zip(parameters, gradient(params, *tasks).values(), strict=True):
            p.grad = grad_p

    return step

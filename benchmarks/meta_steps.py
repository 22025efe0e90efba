"""Meta-steps of maml_cuda, and of the baselines that need only torch.

A builder returns a step: a function without arguments that writes the meta-gradient, the mean over tasks, to the
parameters' `.grad`. Each baseline is the fastest exact variant of its method that we know. Faster ones that pass the
verification are welcome.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from maml_cuda import FusedMAML

from .workloads import Tasks, Workload

Step = Callable[[], None]
Builder = Callable[[Workload, nn.Module, Tasks, bool], Step]
Parameters = dict[str, Tensor]

LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def clear(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


def descend(params: Parameters, grads: Parameters, rate: float) -> Parameters:
    """One SGD step out of place, `p - rate * g`, as one operation per parameter."""
    return {name: torch.sub(p, grads[name], alpha=rate) for name, p in params.items()}


def fused(backend: str, through_autograd: bool = False) -> Builder:
    """maml_cuda on the named backend. With "fused", a fallback to the reference is an error.

    The step is `maml.backward`, or `maml(...).loss.backward()` if `through_autograd`.
    """
    return partial(fused_step, backend, through_autograd)


def fused_step(
    backend: str, through_autograd: bool, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool
) -> Step:
    maml = FusedMAML(
        model, workload.inner_lr, workload.inner_steps, loss=workload.loss, first_order=first_order, backend=backend,
        inner_optimizer=workload.inner_optimizer, inner_clip_norm=workload.inner_clip_norm,
    )  # fmt: skip
    parameters = list(model.parameters())  # listed once: iterating over modules takes as long as a small meta-step

    def step() -> None:
        clear(parameters)
        maml.backward(*tasks)

    def step_through_autograd() -> None:
        clear(parameters)
        maml(*tasks).loss.backward()

    return step_through_autograd if through_autograd else step


def autograd_loop(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """A loop over tasks. Each backward pass runs before the next task, so that only one graph exists at a time.

    Images are in NCHW layout; channels last was not faster on two x86-64 cores. First order builds no graph of the
    inner gradients, so that the parameters are reached through the subtractions only.
    """
    loss = LOSSES[workload.loss]
    params = dict(model.named_parameters())
    parameters = list(params.values())

    def step() -> None:
        clear(parameters)
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            fast = params
            for _ in range(workload.inner_steps):
                support_loss = loss(functional_call(model, fast, (x_spt,)), y_spt)
                grads = torch.autograd.grad(support_loss, list(fast.values()), create_graph=not first_order)
                fast = descend(fast, dict(zip(fast, grads, strict=True)), workload.inner_lr)
            query_loss = loss(functional_call(model, fast, (x_qry,)), y_qry)
            (query_loss / workload.tasks).backward()

    return step


def mean_gradient(workload: Workload, model: nn.Module, first_order: bool) -> Callable[..., Parameters]:
    """A function from `(parameters, *tasks)` to the meta-gradient: `vmap(grad(task))`, then the mean over tasks.

    The order matters: `grad` of a vmapped mean, as in PyTorch's own example, silently gives wrong gradients with
    BatchNorm (seen with torch 2.13).
    """
    loss = LOSSES[workload.loss]

    def task_loss(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x,)), y)

    def adapt(params: Parameters, x_spt: Tensor, y_spt: Tensor) -> Parameters:
        for _ in range(workload.inner_steps):
            params = descend(params, grad(task_loss)(params, x_spt, y_spt), workload.inner_lr)
        return params

    def adapted_loss(params: Parameters, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Tensor:
        return task_loss(adapt(params, x_spt, y_spt), x_qry, y_qry)

    def second_order(params: Parameters, *task: Tensor) -> Parameters:
        return grad(adapted_loss)(params, *task)

    def first_order_only(params: Parameters, *task: Tensor) -> Parameters:
        x_spt, y_spt, x_qry, y_qry = task
        return grad(task_loss)(adapt(params, x_spt, y_spt), x_qry, y_qry)

    task_grads = vmap(first_order_only if first_order else second_order, in_dims=(None, 0, 0, 0, 0))

    def mean(params: Parameters, *tasks: Tensor) -> Parameters:
        return {name: grads.mean(0) for name, grads in task_grads(params, *tasks).items()}

    return mean


def func_vmap(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    return step_of(mean_gradient(workload, model, first_order), model, tasks)


def compiled(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """torch.compile of the whole meta-step of torch.func: one graph, with static shapes."""
    torch._dynamo.reset()
    gradient = mean_gradient(workload, model, first_order)
    return step_of(torch.compile(gradient, fullgraph=True, dynamic=False), model, tasks)


def step_of(gradient: Callable[..., Parameters], model: nn.Module, tasks: Tasks) -> Step:
    """A step that assigns the result of `gradient` to the parameters' `.grad`."""
    parameters = list(model.parameters())
    params = {name: p.detach() for name, p in model.named_parameters()}

    def step() -> None:
        clear(parameters)
        for p, grad_p in zip(parameters, gradient(params, *tasks).values(), strict=True):
            p.grad = grad_p

    return step

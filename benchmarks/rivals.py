"""Who computes a meta-step: we, and the rivals that torch itself is enough for.

Each builder returns a step without arguments that leaves the mean meta-gradient over tasks in the parameters'
`.grad`. Each rival is the fastest exact form of its idea that we know; a faster one that passes the proof is
welcome.
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
    """One SGD step out of place: `p - rate * g`, one operation a parameter."""
    return {name: torch.sub(p, grads[name], alpha=rate) for name, p in params.items()}


def fused(backend: str, through_autograd: bool = False) -> Builder:
    """Ours, with the named backend; the benchmark asks for "fused", so that a fallback is an error.

    It is `maml.backward`, or through autograd a call and its `loss.backward()`.
    """
    return partial(fused_step, backend, through_autograd)


def fused_step(
    backend: str, through_autograd: bool, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool
) -> Step:
    maml = FusedMAML(
        model, workload.inner_lr, workload.inner_steps, loss=workload.loss, first_order=first_order, backend=backend
    )
    parameters = list(model.parameters())  # once: walking the modules costs as much as a small step

    def step() -> None:
        clear(parameters)
        maml.backward(*tasks)

    def step_through_autograd() -> None:
        clear(parameters)
        maml(*tasks).loss.backward()

    return step_through_autograd if through_autograd else step


def autograd_loop(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """One task at a time; its backward runs before the next task, so that one graph is alive at a time.

    Plain NCHW: the convolutions were not faster with channels last (tried on two x86-64 cores).
    First order keeps no graph of the inner gradients; theta is then reached through the subtractions alone.
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
    """`(parameters, *tasks)` to the meta-gradient, all tasks at once: `vmap(grad(task))`, then the mean.

    The gradient is taken inside the vmap. `grad` of a vmapped mean, the order of PyTorch's own example, is
    silently wrong with BatchNorm (seen with torch 2.13), and the proof would refuse it.
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
    return assigning(mean_gradient(workload, model, first_order), model, tasks)


def compiled(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """torch.compile around all of torch.func's step, in one graph, for these shapes alone."""
    torch._dynamo.reset()
    gradient = mean_gradient(workload, model, first_order)
    return assigning(torch.compile(gradient, fullgraph=True, dynamic=False), model, tasks)


def assigning(gradient: Callable[..., Parameters], model: nn.Module, tasks: Tasks) -> Step:
    parameters = list(model.parameters())
    params = {name: p.detach() for name, p in model.named_parameters()}

    def step() -> None:
        clear(parameters)
        for p, grad_p in zip(parameters, gradient(params, *tasks).values(), strict=True):
            p.grad = grad_p

    return step

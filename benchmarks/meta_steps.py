"""Meta-steps of maml_cuda, and of the baseline that compiles. Those that need only torch are in
maml_cuda/benchmark/baselines.py, which says what a step is. Faster ones that pass the verification are welcome.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from maml_cuda import FusedMAML
from maml_cuda.benchmark.baselines import Step, clear, mean_gradient, step_of

from .workloads import Tasks, Workload

Builder = Callable[[Workload, nn.Module, Tasks, bool], Step]


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


def compiled(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """torch.compile of the whole meta-step of torch.func: one graph, with static shapes."""
    torch._dynamo.reset()
    gradient = mean_gradient(workload, model, first_order)
    return step_of(torch.compile(gradient, fullgraph=True, dynamic=False), model, tasks)

"""Baselines from PyTorch libraries, each written like the library's own MAML example.

All loop over tasks and run the backward pass of a task before the next one, so that only one graph exists at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from maml_cuda.benchmark.baselines import LOSSES, Step, clear

from .workloads import Tasks, Workload


def learn2learn(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """The library if it can be imported, else its algorithm; the `note` of the step says which."""
    maml_class, note = learn2learn_maml()
    maml = maml_class(model, lr=workload.inner_lr, first_order=first_order)
    loss = LOSSES[workload.loss]
    parameters = list(model.parameters())

    def step() -> None:
        clear(parameters)
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(workload.inner_steps):
                learner.adapt(loss(learner(x_spt), y_spt))
            (loss(learner(x_qry), y_qry) / workload.tasks).backward()

    step.note = note  # type: ignore[attr-defined]
    return step


def learn2learn_maml() -> tuple[Any, str]:
    """The MAML class, and a note for the report."""
    try:
        from learn2learn.algorithms import MAML
    except Exception as error:  # its dependencies, such as gym, fail to import in many ways
        from .learn2learn_algorithm import MAML

        return MAML, f"its algorithm, rewritten, because importing the library failed ({type(error).__name__}: {error})"
    return MAML, "the library"


def higher(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """`innerloop_ctx`. First order does not track gradients and uses the gradient at the adapted parameters."""
    from higher import innerloop_ctx

    loss = LOSSES[workload.loss]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=workload.inner_lr)

    def step() -> None:
        clear(parameters)
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            with innerloop_ctx(model, optimizer, copy_initial_weights=False, track_higher_grads=not first_order) as (
                fast,
                inner,
            ):
                for _ in range(workload.inner_steps):
                    inner.step(loss(fast(x_spt), y_spt))
                query_loss = loss(fast(x_qry), y_qry) / workload.tasks
                if first_order:
                    grads = torch.autograd.grad(query_loss, list(fast.parameters()))
                    for p, g in zip(parameters, grads, strict=True):
                        p.grad = g if p.grad is None else p.grad.add_(g)
                else:
                    query_loss.backward()

    return step


def torchopt(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """`MetaSGD` for second order, its only mode; the functional `sgd` for first order."""
    import torchopt

    loss = LOSSES[workload.loss]
    parameters = list(model.parameters())

    def second_order_step() -> None:
        clear(parameters)
        optimizer = torchopt.MetaSGD(model, lr=workload.inner_lr)
        start = torchopt.extract_state_dict(model, by="reference")
        state = torchopt.extract_state_dict(optimizer, by="reference")
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            for _ in range(workload.inner_steps):
                optimizer.step(loss(model(x_spt), y_spt))
            (loss(model(x_qry), y_qry) / workload.tasks).backward()
            torchopt.recover_state_dict(model, start)
            torchopt.recover_state_dict(optimizer, state)

    def first_order_step() -> None:
        clear(parameters)
        optimizer = torchopt.sgd(lr=workload.inner_lr)
        theta = dict(model.named_parameters())
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            fast, state = theta, optimizer.init(theta)
            for _ in range(workload.inner_steps):
                support_loss = loss(torch.func.functional_call(model, fast, (x_spt,)), y_spt)
                grads = dict(zip(fast, torch.autograd.grad(support_loss, list(fast.values())), strict=True))
                updates, state = optimizer.update(grads, state, params=fast, inplace=False)
                fast = torchopt.apply_updates(fast, updates, inplace=False)
            query_loss = loss(torch.func.functional_call(model, fast, (x_qry,)), y_qry)
            (query_loss / workload.tasks).backward()

    return first_order_step if first_order else second_order_step

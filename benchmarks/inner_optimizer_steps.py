"""Baselines whose inner loop has momentum or Adam (`Workload.inner_optimizer`), at second order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_cuda import optim
from maml_cuda.benchmark.baselines import LOSSES, Step, clear

from .workloads import Tasks, Workload

State = list[tuple[Tensor, ...]] | None  # of each parameter; None before the first step
Rule = Callable[[Sequence[Tensor], Sequence[Tensor], State, int], tuple[list[Tensor], State]]


def autograd_loop(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """The loop over tasks of maml_cuda/benchmark/baselines.py, with the optimizer's update written out."""
    loss, rule = LOSSES[workload.loss], rule_of(workload)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())

    def step() -> None:
        clear(parameters)
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            fast: list[Tensor] = list(parameters)
            state: State = None
            for k in range(workload.inner_steps):
                support_loss = loss(functional_call(model, dict(zip(names, fast, strict=True)), (x_spt,)), y_spt)
                grads = torch.autograd.grad(support_loss, fast, create_graph=not first_order)
                fast, state = rule(fast, grads, state, k + 1)
            query_loss = loss(functional_call(model, dict(zip(names, fast, strict=True)), (x_qry,)), y_qry)
            (query_loss / workload.tasks).backward()

    return step


def rule_of(workload: Workload) -> Rule:
    """The update of all parameters in step t = 1, 2, ..."""
    rate, optimizer = workload.inner_lr, workload.inner_optimizer
    if isinstance(optimizer, optim.SGD):
        momentum = optimizer.momentum

        def sgd(fast: Sequence[Tensor], grads: Sequence[Tensor], state: State, t: int) -> tuple[list[Tensor], State]:
            if state is None:
                buffers = list(grads)
            else:
                buffers = [torch.add(g, m, alpha=momentum) for g, (m,) in zip(grads, state, strict=True)]
            return [torch.sub(p, m, alpha=rate) for p, m in zip(fast, buffers, strict=True)], [(m,) for m in buffers]

        return sgd
    assert isinstance(optimizer, optim.Adam)
    beta1, beta2, eps = optimizer.beta1, optimizer.beta2, optimizer.eps

    def adam(fast: Sequence[Tensor], grads: Sequence[Tensor], state: State, t: int) -> tuple[list[Tensor], State]:
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        updated, states = [], []
        for i, (p, g) in enumerate(zip(fast, grads, strict=True)):
            if state is None:
                m, s = (1 - beta1) * g, (1 - beta2) * g * g
            else:
                m, s = torch.lerp(state[i][0], g, 1 - beta1), torch.addcmul(state[i][1] * beta2, g, g, value=1 - beta2)
            # The root's derivative is infinite at 0, where the gradient has always been 0.
            at_zero = s == 0
            root = s.masked_fill(at_zero, 1).sqrt().masked_fill(at_zero, 0)
            denominator = root / math.sqrt(correction2) + eps
            updated.append(torch.addcdiv(p, m, denominator, value=-rate / correction1))
            states.append((m, s))
        return updated, states

    return adam


def higher(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """`innerloop_ctx` with the library's differentiable SGD or Adam.

    Its Adam adds eps to the root before the root's bias is corrected, torch's afterwards. Given
    `eps sqrt(1 - beta2^t)` in step t, both are the same formula.
    """
    from higher import innerloop_ctx

    if first_order:
        raise NotImplementedError("this baseline has second order only")
    loss, optimizer = LOSSES[workload.loss], workload.inner_optimizer
    parameters = list(model.parameters())
    own: torch.optim.Optimizer
    overrides: list[dict[str, list[float]] | None] = [None] * workload.inner_steps
    if isinstance(optimizer, optim.SGD):
        own = torch.optim.SGD(parameters, workload.inner_lr, momentum=optimizer.momentum)
    else:
        assert isinstance(optimizer, optim.Adam)
        beta2, eps = optimizer.beta2, optimizer.eps
        own = torch.optim.Adam(parameters, workload.inner_lr, (optimizer.beta1, beta2), eps)
        overrides = [{"eps": [eps * math.sqrt(1 - beta2 ** (k + 1))]} for k in range(workload.inner_steps)]

    def step() -> None:
        clear(parameters)
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks, strict=True):
            with innerloop_ctx(model, own, copy_initial_weights=False) as (fast, inner):
                for override in overrides:
                    inner.step(loss(fast(x_spt), y_spt), override=override)
                (loss(fast(x_qry), y_qry) / workload.tasks).backward()

    return step

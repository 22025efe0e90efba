"""The outer step: how the policy's parameters follow the meta-gradient.

Everything that is differentiated is differentiated by fused passes (``inner.py``): the surrogate, with its exact
meta-gradient, and the product of the Fisher matrix of the adapted policies, through the inner steps, with a direction.
The line search only runs forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_cuda import FusedMAML, PolicyTarget, policies
from maml_cuda.policies import Policy
from maml_cuda.rl.inner import AdaptedPolicies, MetaSamples, Vector, adapt_policies

CG_ITERATIONS = 10
CG_TOLERANCE = 1e-10
LINE_SEARCH_STEPS = 15
LINE_SEARCH_FACTOR = 0.8
KL_LIMIT = 1.0  # of a clipped step


class OuterStep(NamedTuple):
    """What an outer step did."""

    surrogate_before: float
    surrogate_after: float
    kl: float  # mean over tasks of KL(adapted before || adapted after)
    accepted: bool


def trpo(maml: FusedMAML, samples: MetaSamples, max_kl: float, damping: float) -> OuterStep:
    """One trust-region step (Schulman et al. 2015): along ``F^-1 g`` as far as the KL bound allows.

    Conjugate gradients solve ``(F + damping) s = g``; the step ``s * sqrt(2 max_kl / s^T (F + damping) s)`` is
    shortened by 0.8, up to 15 times, until the surrogate falls and the mean KL of the adapted policies is at most
    ``max_kl``. The parameters stay as they were where no length serves.
    """
    parameters = _parameters(maml)
    now = adapt_policies(maml, samples)
    before, gradient = _surrogate_and_gradient(now, [y for _, y in samples.query])
    fisher = now.fisher()

    def damped_fisher(v: Vector) -> Vector:
        product = fisher(v)
        return {name: product[name] + damping * v[name] for name in v}

    step = conjugate_gradients(damped_fisher, gradient)
    curvature = dot(step, damped_fisher(step))
    if not curvature > 0:  # a gradient of zero
        return OuterStep(before, before, 0.0, False)
    step = _scaled(step, (2 * max_kl / curvature) ** 0.5)
    old = now.policies()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for attempt in range(LINE_SEARCH_STEPS):
        _assign(parameters, start, step, -(LINE_SEARCH_FACTOR**attempt))
        new = adapt_policies(maml, samples).policies()
        surrogate, kl = _surrogate(new, samples), _mean_kl(old, new, samples)
        if surrogate < before and kl <= max_kl:  # false for NaN
            return OuterStep(before, surrogate, kl, True)
    _assign(parameters, start, step, 0.0)
    return OuterStep(before, before, 0.0, False)


def vpg(maml: FusedMAML, samples: MetaSamples, optimizer: torch.optim.Optimizer) -> OuterStep:
    """One step of the optimizer along the meta-gradient (REINFORCE: at the policy that acted, the ratio is 1)."""
    now = adapt_policies(maml, samples)
    old = now.policies()
    before, gradient = _surrogate_and_gradient(now, [y for _, y in samples.query])
    _optimize(maml, optimizer, gradient)
    new = adapt_policies(maml, samples).policies()
    return OuterStep(before, _surrogate(new, samples), _mean_kl(old, new, samples), True)


def clipped(
    maml: FusedMAML, samples: MetaSamples, optimizer: torch.optim.Optimizer, epochs: int, clip: float
) -> OuterStep:
    """``epochs`` steps on PPO's clipped surrogate (Schulman et al. 2017) with MAML's exact gradient: the outer loss of
    ProMP (Rothfuss et al. 2019) without its penalty on the inner KL.

    Where ``min(r A, clip(r) A)`` is the clipped one a sample's gradient is zero, and otherwise that of ``r A``: so each
    epoch is the fused likelihood-ratio loss with the advantages of clipped samples set to 0.

    Clipping bounds what a sample is worth, not how far the policies go: a step with a mean KL above 1, or with one
    that is no number, is taken back.
    """
    parameters = _parameters(maml)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    old: list[Policy] = []
    first = 0.0
    for epoch in range(epochs):
        now = adapt_policies(maml, samples)
        found = now.policies()
        kept = [_kept(policy, y, clip) for policy, (_, y) in zip(found, samples.query, strict=True)]
        loss, gradient = _surrogate_and_gradient(now, kept)
        if epoch == 0:
            old, first = found, loss
        _optimize(maml, optimizer, gradient)
    new = adapt_policies(maml, samples).policies()
    kl = _mean_kl(old, new, samples)
    if not kl <= KL_LIMIT:
        _assign(parameters, start, start, 0.0)
        return OuterStep(first, first, 0.0, False)
    return OuterStep(first, _surrogate(new, samples), kl, True)


def _kept(policy: Policy, y: PolicyTarget, clip: float) -> PolicyTarget:
    """y without the advantages of clipped samples."""
    ratio = _ratio(policy, y)
    is_clipped = torch.where(y.advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return y._replace(advantages=y.advantages.masked_fill(is_clipped, 0))


def conjugate_gradients(product: Callable[[Vector], Vector], b: Vector, iterations: int = CG_ITERATIONS) -> Vector:
    """``x`` with ``product(x) = b`` after so many iterations from 0; fewer where the residual vanishes."""
    x = {name: torch.zeros_like(value) for name, value in b.items()}
    residual = {name: value.clone() for name, value in b.items()}
    direction = residual
    squared = dot(residual, residual)
    for _ in range(iterations):
        if not squared > CG_TOLERANCE:
            break
        image = product(direction)
        length = squared / dot(direction, image)
        x = _sum(x, direction, length)
        residual = _sum(residual, image, -length)
        squared, previous = dot(residual, residual), squared
        direction = _sum(residual, direction, squared / previous)
    return x


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _sum(a: Vector, b: Vector, factor: float) -> Vector:
    return {name: a[name] + factor * b[name] for name in a}


def _scaled(a: Vector, factor: float) -> Vector:
    return {name: factor * value for name, value in a.items()}


def _parameters(maml: FusedMAML) -> dict[str, Any]:
    return {name: p for name, p in maml.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _assign(parameters: Mapping[str, Tensor], start: Vector, step: Vector, factor: float) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(start[name] + factor * step[name])


def _surrogate_and_gradient(now: AdaptedPolicies, targets: Sequence[PolicyTarget]) -> tuple[float, Vector]:
    """ValueError where one of them is not finite."""
    losses, gradient = now.surrogate_and_gradient(targets)
    broken = ~losses.isfinite()
    if broken.any():
        task = int(broken.nonzero()[0])
        raise ValueError(f"the surrogate must be finite, got {losses[task]:g} in task {task}")
    if not math.isfinite(dot(gradient, gradient)):
        raise ValueError("the meta-gradient must be finite, got NaN or infinity: lower --inner-lr")
    return float(losses.mean()), gradient


def _optimize(maml: FusedMAML, optimizer: torch.optim.Optimizer, gradient: Vector) -> None:
    for name, parameter in _parameters(maml).items():
        parameter.grad = gradient[name]
    optimizer.step()
    optimizer.zero_grad()


def _surrogate(found: Sequence[Policy], samples: MetaSamples) -> float:
    pairs = zip(found, samples.query, strict=True)
    losses = [-_task_mean(_ratio(policy, y) * y.advantages, y.weights) for policy, (_, y) in pairs]
    return sum(losses) / len(losses)


def _mean_kl(old: Sequence[Policy], new: Sequence[Policy], samples: MetaSamples) -> float:
    triples = zip(old, new, samples.query, strict=True)
    means = [_task_mean(policies.kl_divergence(before, after), y.weights) for before, after, (_, y) in triples]
    return sum(means) / len(means)


def _ratio(policy: Policy, y: PolicyTarget) -> Tensor:
    assert y.old_log_probs is not None
    return (policies.log_prob(policy, y.actions) - y.old_log_probs).exp()


def _task_mean(values: Tensor, weights: Tensor | None) -> float:
    """The mean over tasks of each task's mean over its samples ``[tasks, samples]``."""
    if weights is None:
        return float(values.mean())
    return float(((values * weights).sum(1) / weights.sum(1)).mean())

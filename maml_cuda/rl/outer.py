"""The outer step: updates the policy's parameters with the meta-gradient.

Fused passes compute all derivatives (``inner.py``): the surrogate with its exact meta-gradient, and the product of the
Fisher matrix of the adapted policies with a direction, through the inner steps. The line search only runs forward
passes.
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
KL_LIMIT = 1.0  # greatest mean KL divergence of a clipped step


class OuterStep(NamedTuple):
    """The result of an outer step.

    Attributes:
        surrogate_before: the surrogate loss before the step.
        surrogate_after: the surrogate loss after the step.
        kl: the mean over tasks of KL(adapted policy before || adapted policy after).
        accepted: whether the parameters changed.
    """

    surrogate_before: float
    surrogate_after: float
    kl: float
    accepted: bool


def trpo(maml: FusedMAML, samples: MetaSamples, max_kl: float, damping: float) -> OuterStep:
    """One trust-region step (TRPO, Schulman et al. 2015).

    Conjugate gradients solve ``(F + damping) s = g``. The step ``s * sqrt(2 max_kl / s^T (F + damping) s)`` is
    multiplied by 0.8, up to 15 times, until the surrogate falls and the mean KL of the adapted policies is at most
    ``max_kl``. If no length satisfies both, the parameters do not change.

    Args:
        maml: the policy.
        samples: the samples of the meta-batch.
        max_kl: the bound on the mean KL divergence.
        damping: added to the diagonal of the Fisher matrix.

    Raises:
        ValueError: the surrogate or the meta-gradient is not finite.
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
    if not curvature > 0:  # the gradient is zero
        return OuterStep(before, before, 0.0, False)
    step = _scaled(step, (2 * max_kl / curvature) ** 0.5)
    old = now.policies()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for attempt in range(LINE_SEARCH_STEPS):
        _assign(parameters, start, step, -(LINE_SEARCH_FACTOR**attempt))
        new = adapt_policies(maml, samples).policies()
        surrogate, kl = _surrogate(new, samples), _mean_kl(old, new, samples)
        if surrogate < before and kl <= max_kl:  # False for NaN
            return OuterStep(before, surrogate, kl, True)
    _assign(parameters, start, step, 0.0)
    return OuterStep(before, before, 0.0, False)


def vpg(maml: FusedMAML, samples: MetaSamples, optimizer: torch.optim.Optimizer) -> OuterStep:
    """One step of the optimizer along the meta-gradient (REINFORCE, because the ratio is 1 at the policy that sampled).

    Raises:
        ValueError: the surrogate or the meta-gradient is not finite.
    """
    now = adapt_policies(maml, samples)
    old = now.policies()
    before, gradient = _surrogate_and_gradient(now, [y for _, y in samples.query])
    _optimize(maml, optimizer, gradient)
    new = adapt_policies(maml, samples).policies()
    return OuterStep(before, _surrogate(new, samples), _mean_kl(old, new, samples), True)


def clipped(
    maml: FusedMAML, samples: MetaSamples, optimizer: torch.optim.Optimizer, epochs: int, clip: float
) -> OuterStep:
    """``epochs`` optimizer steps on PPO's clipped surrogate (Schulman et al. 2017) with MAML's exact gradient.

    This is the outer loss of ProMP (Rothfuss et al. 2019) without its penalty on the inner KL. A sample's gradient is
    zero if the clipped term of ``min(r A, clip(r) A)`` is the smaller one, otherwise that of ``r A``. So each epoch is
    the fused likelihood-ratio loss with the advantages of clipped samples set to 0.

    Clipping does not bound how far the policies move. A step whose mean KL is above 1, or is NaN, is undone.

    Raises:
        ValueError: the surrogate or the meta-gradient is not finite.
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
    """``y`` with the advantages of clipped samples set to 0."""
    ratio = _ratio(policy, y)
    is_clipped = torch.where(y.advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return y._replace(advantages=y.advantages.masked_fill(is_clipped, 0))


def conjugate_gradients(product: Callable[[Vector], Vector], b: Vector, iterations: int = CG_ITERATIONS) -> Vector:
    """Solves ``product(x) = b`` by conjugate gradients from 0, for at most ``iterations`` iterations."""
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
    """The dot product over all parameters, in float64."""
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
    """The mean surrogate loss and its meta-gradient. Raises ValueError if one is not finite."""
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
    """The mean over tasks of the weighted mean over each task's samples. ``values`` is ``[tasks, samples]``."""
    if weights is None:
        return float(values.mean())
    return float(((values * weights).sum(1) / weights.sum(1)).mean())

"""The adapted policies of a meta-batch, as an outer step differentiates through them.

With one inner step at most, everything is one fused pass. With several, each on a support set of its own, the passes
are chained here, ``phi_{k+1} = phi_k - alpha_k grad L(phi_k; set k)``: backwards by one Hessian-vector product a step,
``v_k = v_{k+1} - H(phi_k; set k) (alpha_k v_{k+1})``, as the fused pass itself does where all steps share one set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from maml_cuda import FusedMAML, PolicyTarget, policies
from maml_cuda.policies import Policy

Vector = dict[str, Tensor]  # by parameter
Rates = Mapping[str, float | Tensor]  # by adapted parameter
Samples = tuple[Tensor, PolicyTarget]  # x [tasks, n, observation_size] and what was done there


class MetaSamples(NamedTuple):
    """What an outer step learns from."""

    support: tuple[Samples, ...]  # score form; set k drawn by the policies after k inner steps
    query: Samples  # likelihood-ratio form, drawn by the policies after all of them


class Adapted(Protocol):
    """The adapted policies at the parameters as they are when this is made."""

    def policies(self) -> Policy:
        """Each task's own on its own query states."""

    def surrogate_and_gradient(self, y: PolicyTarget) -> tuple[Tensor, Vector]:
        """The loss of each task on the query states [tasks], and the meta-gradient of their mean."""

    def fisher(self) -> Callable[[Vector], Vector]:
        """``FusedMAML.fisher`` on the query states."""


def adapted(maml: FusedMAML, samples: MetaSamples) -> Adapted:
    """ValueError where there is not one support set for each inner step, or where something would be left out: the
    gradient of learned rates, query_weights, and with several steps BatchNorm with slots."""
    _check(maml, samples.support)
    return OneStep(maml, samples) if maml.inner_steps <= 1 else SeveralSteps(maml, samples)


class OneStep:
    """One inner step or none."""

    def __init__(self, maml: FusedMAML, samples: MetaSamples) -> None:
        self._maml = maml
        self._support = samples.support[0] if samples.support else samples.query  # of no step it does not matter
        self._x, self._weights = samples.query[0], samples.query[1].weights

    @torch.no_grad()
    def policies(self) -> Policy:
        return self._maml.predict(self._maml.adapt(*self._support), self._x)  # type: ignore[no-any-return]

    def surrogate_and_gradient(self, y: PolicyTarget) -> tuple[Tensor, Vector]:
        out = self._maml(*self._support, self._x, y)
        theta = {name: p for name, p in self._maml.model.named_parameters() if p.requires_grad}
        gradient = torch.autograd.grad(out.loss, list(theta.values()))
        return out.task_losses, dict(zip(theta, gradient, strict=True))

    def fisher(self) -> Callable[[Vector], Vector]:
        return self._maml.fisher(*self._support, self._x, weights=self._weights)


class SeveralSteps:
    """Several inner steps, each on a support set of its own."""

    def __init__(self, maml: FusedMAML, samples: MetaSamples) -> None:
        self._maml = maml
        self._x, self._weights = samples.query[0], samples.query[1].weights
        alphas = maml._rates().items()
        rates = [{name: alpha.at(step) for name, alpha in alphas} for step in range(maml.inner_steps)]
        self._steps: list[tuple[Vector, Samples, Rates]] = []  # phi_k, its support set, alpha_k
        phi = unadapted(maml, len(self._x))
        for support, rate in zip(samples.support, rates, strict=True):
            self._steps.append((phi, support, rate))
            phi = descend(maml, phi, *support, rate)
        self._phi = phi

    @torch.no_grad()
    def policies(self) -> Policy:
        return self._maml.predict(self._phi, self._x)  # type: ignore[no-any-return]

    def surrogate_and_gradient(self, y: PolicyTarget) -> tuple[Tensor, Vector]:
        losses, gradient = self._maml.loss_and_grad(self._phi, self._x, y)
        return losses, self._pulled_back(gradient)

    def fisher(self) -> Callable[[Vector], Vector]:
        """``v -> J^T F J v``: J forwards through the chain, ``u_{k+1} = u_k - alpha_k H(phi_k; set k) u_k``, the Fisher
        matrix of the adapted policies, and J^T backwards."""
        states = fisher_samples(self.policies(), self._x, self._weights)

        def product(v: Vector) -> Vector:
            u = {name: direction.expand(len(self._x), *direction.shape) for name, direction in v.items()}
            if not self._maml.first_order:
                for phi, support, rates in self._steps:
                    u = _descended(u, self._maml.hvp(phi, *support, u), rates)
            return self._pulled_back(self._maml.hvp(self._phi, *states, u))

        return product

    def _pulled_back(self, v: Vector) -> Vector:
        """The mean over tasks of ``J^T v``."""
        if not self._maml.first_order:
            for phi, support, rates in reversed(self._steps):
                product = self._maml.hvp(phi, *support, {name: rate * v[name] for name, rate in rates.items()})
                v = {name: v[name] - product[name] for name in v}
        return {name: cotangent.mean(0) for name, cotangent in v.items()}


def unadapted(maml: FusedMAML, tasks: int) -> Vector:
    """The policy itself for each task, as views."""
    return {
        name: parameter.detach().unsqueeze(0).expand(tasks, *parameter.shape)
        for name, parameter in maml.model.named_parameters()
    }


def descend(maml: FusedMAML, fast: Mapping[str, Tensor], x: Tensor, y: PolicyTarget, rates: Rates) -> Vector:
    """``fast`` after one inner step."""
    return _descended(fast, maml.loss_and_grad(fast, x, y)[1], rates)


def _descended(fast: Mapping[str, Tensor], along: Mapping[str, Tensor], rates: Rates) -> Vector:
    """``fast`` less rate times ``along``, where there is a rate."""
    return {name: value - rates[name] * along[name] if name in rates else value for name, value in fast.items()}


def fisher_samples(policy: Policy, x: Tensor, weights: Tensor | None) -> Samples:
    """Samples on which the Hessian of the mean of ``-A log pi`` is the Fisher matrix of ``policy`` averaged over the
    states x.

    The expectation over actions of the Hessian of ``-log pi`` is the Fisher matrix, and a few actions have it exactly:
    of a Gaussian the two ``mean +- deviation``, of a categorical policy every action with its probability as advantage.
    In both the mean cotangent of the policy's output is zero, so that the network's own curvature drops out.
    """
    if isinstance(policy, Tensor):
        count = policy.shape[-1]
        actions = torch.arange(count, device=x.device).expand(policy.shape)
        chances = count * policy.softmax(-1)
    else:
        count = 2
        mean, deviation = policies.by_state(policy)
        actions = torch.stack([mean + deviation.exp(), mean - deviation.exp()], 2)
        chances = torch.ones_like(x[:, :, :1]).expand(-1, -1, count)
    shares = None if weights is None else weights.repeat_interleave(count, 1)
    return x.repeat_interleave(count, 1), PolicyTarget(actions.flatten(1, 2), chances.flatten(1), None, shares)


def _check(maml: FusedMAML, support: Sequence[Samples]) -> None:
    steps = maml.inner_steps
    if len(support) != steps:
        raise ValueError(f"support must hold one set for each inner step, which are {steps}, got {len(support)}")
    if maml.query_weights is not None:
        raise ValueError("query_weights must be None in an outer step of a policy, got some")
    rates = [rate.value for rate in maml._rates().values()]
    if any(isinstance(rate, Tensor) and rate.requires_grad for rate in rates):
        raise ValueError("inner_lr must be fixed in an outer step of a policy, got rates that are learned")
    if steps > 1 and maml.batch_norm == "per_step":
        raise ValueError("batch_norm must not be per_step where each inner step has a support set of its own")

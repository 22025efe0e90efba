"""The adapted policies of a meta-batch, and derivatives through the inner loop for the outer step.

Up to one inner step is a single fused pass. Several inner steps have a support set each, so their passes are chained
here, as the fused pass does if all steps share one set:

    forward:  phi_{k+1} = phi_k - alpha_k grad L(phi_k; set k)
    backward: v_k = v_{k+1} - H(phi_k; set k) (alpha_k v_{k+1})   # one Hessian-vector product per step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from maml_cuda import FusedMAML, PolicyTarget, policies
from maml_cuda.policies import Policy

Vector = dict[str, Tensor]  # parameter name -> tensor
Rates = Mapping[str, float | Tensor]  # adapted parameter name -> inner rate
Samples = tuple[Tensor, PolicyTarget]  # observations [tasks, n, observation_size], and actions and advantages there


class MetaSamples(NamedTuple):
    """The samples that an outer step uses. The outer objective is the mean over the query sets.

    Attributes:
        support: score form; set k is sampled by the policies after k inner steps.
        query: likelihood-ratio form; the last set is sampled by the policies after all inner steps, the one before it
            by the policies after all but one, and so on.
    """

    support: tuple[Samples, ...]
    query: tuple[Samples, ...]


class AdaptedPolicies(Protocol):
    """The adapted policies at the values that the meta-parameters have when the object is created."""

    def policies(self) -> list[Policy]:
        """The output of each task's adapted policy on each query set."""

    def surrogate_and_gradient(self, targets: Sequence[PolicyTarget]) -> tuple[Tensor, Vector]:
        """The loss of each task with these targets on the query sets, ``[tasks]``, and the meta-gradient of the mean
        loss.
        """

    def fisher(self) -> Callable[[Vector], Vector]:
        """``FusedMAML.fisher`` on the states of the query sets: a function ``v -> F v``."""


def adapt_policies(maml: FusedMAML, samples: MetaSamples) -> AdaptedPolicies:
    """Adapts the policies of a meta-batch.

    Raises:
        ValueError: the number of support sets is not that of inner steps, or the settings need a term that is not
            computed here: learned rates, ``query_weights``, or per-step BatchNorm with several steps.
    """
    _check(maml, samples)
    return OneStep(maml, samples) if maml.inner_steps <= 1 else SeveralSteps(maml, samples)


class OneStep:
    """Adapted policies with at most one inner step."""

    def __init__(self, maml: FusedMAML, samples: MetaSamples) -> None:
        self._maml = maml
        ((self._x, y),) = samples.query
        self._support = samples.support[0] if samples.support else (self._x, y)  # unused without a step
        self._weights = y.weights

    @torch.no_grad()
    def policies(self) -> list[Policy]:
        return [self._maml.predict(self._maml.adapt(*self._support), self._x)]

    def surrogate_and_gradient(self, targets: Sequence[PolicyTarget]) -> tuple[Tensor, Vector]:
        out = self._maml(*self._support, self._x, *targets)
        theta = {name: p for name, p in self._maml.model.named_parameters() if p.requires_grad}
        gradient = torch.autograd.grad(out.loss, list(theta.values()))
        return out.task_losses, dict(zip(theta, gradient, strict=True))

    def fisher(self) -> Callable[[Vector], Vector]:
        return self._maml.fisher(*self._support, self._x, weights=self._weights)


class SeveralSteps:
    """Adapted policies with several inner steps, each on its own support set."""

    def __init__(self, maml: FusedMAML, samples: MetaSamples) -> None:
        self._maml, self._support = maml, samples.support
        updates = maml._inner_update().updates.items()
        self._rates = [{name: update.rate.at(step) for name, update in updates} for step in range(maml.inner_steps)]
        self._phi = [initial_parameters(maml, len(samples.query[0][0]))]  # after 0, 1, ... steps
        for support, rates in zip(self._support, self._rates, strict=True):
            self._phi.append(inner_step(maml, self._phi[-1], *support, rates))
        self._query = dict(zip(range(maml.inner_steps, 0, -1), reversed(samples.query), strict=False))  # by step

    @torch.no_grad()
    def policies(self) -> list[Policy]:
        return [self._maml.predict(self._phi[k], self._query[k][0]) for k in sorted(self._query)]

    def surrogate_and_gradient(self, targets: Sequence[PolicyTarget]) -> tuple[Tensor, Vector]:
        found = {
            k: self._maml.loss_and_grad(self._phi[k], self._query[k][0], y)
            for k, y in zip(sorted(self._query), targets, strict=True)
        }
        losses = torch.stack([losses for losses, _ in found.values()]).mean(0)
        return losses, self._pull_back({k: gradient for k, (_, gradient) in found.items()})

    def fisher(self) -> Callable[[Vector], Vector]:
        """``v -> J^T F J v``, averaged over tasks and query sets.

        J goes forward through the inner loop, ``u_{k+1} = u_k - alpha_k H(phi_k; set k) u_k``; F is the Fisher matrix
        of the adapted policies; J^T goes backward.
        """
        states = {
            k: fisher_samples(policy, self._query[k][0], self._query[k][1].weights)
            for k, policy in zip(sorted(self._query), self.policies(), strict=True)
        }

        def product(v: Vector) -> Vector:
            u = {name: direction.expand(len(self._phi[0][name]), *direction.shape) for name, direction in v.items()}
            cotangents = {}
            for k, phi in enumerate(self._phi):
                if k in states:
                    cotangents[k] = self._maml.hvp(phi, *states[k], u)
                if k < len(self._support) and not self._maml.first_order:
                    u = _step_along(u, self._maml.hvp(phi, *self._support[k], u), self._rates[k])
            return self._pull_back(cotangents)

        return product

    def _pull_back(self, cotangents: Mapping[int, Vector]) -> Vector:
        """The mean over tasks and query sets of ``J^T`` times the cotangents of phi_k, which are given by k."""
        v = cotangents[len(self._support)]
        for k in reversed(range(len(self._support))):
            if not self._maml.first_order:
                stepped = {name: rate * v[name] for name, rate in self._rates[k].items()}
                product = self._maml.hvp(self._phi[k], *self._support[k], stepped)
                v = {name: v[name] - product[name] for name in v}
            if k in cotangents:
                v = {name: v[name] + cotangents[k][name] for name in v}
        return {name: cotangent.mean(0) / len(cotangents) for name, cotangent in v.items()}


def initial_parameters(maml: FusedMAML, tasks: int) -> Vector:
    """The parameters of the policy for each task, before adaptation: name -> views ``[tasks, *shape]``."""
    return {
        name: parameter.detach().unsqueeze(0).expand(tasks, *parameter.shape)
        for name, parameter in maml.model.named_parameters()
    }


def inner_step(maml: FusedMAML, fast: Mapping[str, Tensor], x: Tensor, y: PolicyTarget, rates: Rates) -> Vector:
    """``fast`` after one inner gradient step on the samples ``x, y``."""
    return _step_along(fast, maml.loss_and_grad(fast, x, y)[1], rates)


def _step_along(fast: Mapping[str, Tensor], along: Mapping[str, Tensor], rates: Rates) -> Vector:
    """``fast - rate * along`` for the parameters that have a rate; the others do not change."""
    return {name: value - rates[name] * along[name] if name in rates else value for name, value in fast.items()}


def fisher_samples(policy: Policy, x: Tensor, weights: Tensor | None) -> Samples:
    """Samples whose loss, the mean of ``-A log pi``, has the Fisher matrix of ``policy`` as its Hessian, averaged over
    the states x.

    The Fisher matrix is the expectation over actions of the Hessian of ``-log pi``. A few actions give it exactly:
    ``mean + std`` and ``mean - std`` for a Gaussian, and every action, with its probability as advantage, for a
    categorical policy. With these actions the mean cotangent of the policy's output is zero, so the curvature of the
    network itself does not contribute.
    """
    if isinstance(policy, Tensor):
        count = policy.shape[-1]
        actions = torch.arange(count, device=x.device).expand(policy.shape)
        chances = count * policy.softmax(-1)
    else:
        count = 2
        mean, log_std = policies.by_state(policy)
        actions = torch.stack([mean + log_std.exp(), mean - log_std.exp()], 2)
        chances = torch.ones_like(mean[..., :1]).expand(-1, -1, count)
    shares = None if weights is None else weights.repeat_interleave(count, 1)
    return x.repeat_interleave(count, 1), PolicyTarget(actions.flatten(1, 2), chances.flatten(1), None, shares)


def _check(maml: FusedMAML, samples: MetaSamples) -> None:
    steps, sets, queries = maml.inner_steps, len(samples.support), len(samples.query)
    if sets != steps:
        raise ValueError(f"support must hold {steps} sets, one for each inner step, got {sets}")
    if not 1 <= queries <= max(steps, 1):
        raise ValueError(f"query must hold 1 to {max(steps, 1)} sets, at most one for each inner step, got {queries}")
    if maml.query_weights is not None:
        raise ValueError("query_weights must be None in the outer step of a policy, got weights")
    if any(t.requires_grad for t in maml._inner_update().tensors()):
        raise ValueError("inner_lr must be fixed in the outer step of a policy, got learned rates")
    if steps > 1 and not (maml.inner_optimizer is maml.inner_transform is None):
        raise ValueError(
            "inner_optimizer and inner_transform must be None if each inner step has its own support set, got "
            f"{type(maml.inner_optimizer or maml.inner_transform).__name__}"
        )
    if steps > 1 and not (maml.inner_clip_norm is maml.inner_clip_value is None):
        raise ValueError(
            "inner_clip_norm and inner_clip_value must be None if each inner step has its own support set, got "
            f"{maml.inner_clip_norm} and {maml.inner_clip_value}"
        )
    if steps > 1 and maml.batch_norm == "per_step":
        raise ValueError("batch_norm must not be per_step if each inner step has its own support set")

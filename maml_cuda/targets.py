"""Targets: what a loss compares a prediction with.

A target is one tensor, or a PolicyTarget for a policy-gradient loss. For a loss of the user's own it may be any pytree
of tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

POLICY_LOSSES = ("gaussian_policy_gradient", "categorical_policy_gradient")


class PolicyTarget(NamedTuple):
    """The target of a policy-gradient loss (Finn, Abbeel, Levine 2017, section 3.2): actions and their advantages.

    Without `old_log_probs`, the loss of a task is the score-function form (REINFORCE):

        -sum_n w_n A_n log pi(a_n|x_n) / sum_n w_n

    With `old_log_probs`, it is the likelihood-ratio form:

        -sum_n w_n A_n exp(log pi(a_n|x_n) - old_n) / sum_n w_n

    Attributes:
        actions: a_n. `[tasks, samples, action]` in the model's dtype (Gaussian policy), or int64 `[tasks, samples]`
            (categorical policy).
        advantages: A_n, `[tasks, samples]`.
        old_log_probs: old_n, `[tasks, samples]`: log-probabilities of the actions under the policy that drew them, in
            nats; or None.
        weights: w_n, `[tasks, samples]`, at least 0; None: all 1. To pad a task that has fewer samples than the others,
            give the padding the weight 0 and any finite numbers. It does not change the loss.
    """

    actions: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None = None
    weights: Tensor | None = None


Target = Any


def tensors(y: Tensor | PolicyTarget) -> list[Tensor | None]:
    """The tensors of the target of a built-in loss, in order: one, or the four fields of a PolicyTarget."""
    return [y] if isinstance(y, Tensor) else list(y)


def coefficients(y: PolicyTarget) -> Tensor:
    """w_n A_n / sum_n w_n, over the last axis: the factor of each sample in the loss."""
    if y.weights is None:
        return y.advantages / y.advantages.shape[-1]
    return y.advantages * shares(y.weights)


def shares(weights: Tensor) -> Tensor:
    """w_n / sum_n w_n, over the last axis."""
    return weights / weights.sum(-1, keepdim=True)

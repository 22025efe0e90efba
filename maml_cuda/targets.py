"""What a loss compares a prediction with: one tensor, the small structure of a policy-gradient loss, or, for a loss of
the user's own, any pytree of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

POLICY_LOSSES = ("gaussian_policy_gradient", "categorical_policy_gradient")


class PolicyTarget(NamedTuple):
    """The samples of a policy-gradient loss (Finn, Abbeel, Levine 2017, section 4.2), tasks first.

    With `old_log_probs` None the loss is the score form, -sum_n w_n A_n log pi(a_n|x_n) / sum_n w_n; with them the
    likelihood-ratio form, -sum_n w_n A_n exp(log pi(a_n|x_n) - old_n) / sum_n w_n.

    Attributes:
        actions: [tasks, samples, action] in the model's dtype (Gaussian), or int64 [tasks, samples] (categorical).
        advantages: [tasks, samples].
        old_log_probs: [tasks, samples], log-probabilities of the actions under the policy that drew them; or None.
        weights: [tasks, samples], at least 0; None: ones. A task with fewer samples than the others is padded with any
            finite numbers of weight 0, and its loss is then that of its own samples.
    """

    actions: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None = None
    weights: Tensor | None = None


Target = Any


def tensors(y: Tensor | PolicyTarget) -> list[Tensor | None]:
    """Those of a loss that has a name, in order: one, or a PolicyTarget's four fields, some of them None."""
    return [y] if isinstance(y, Tensor) else list(y)


def coefficients(y: PolicyTarget) -> Tensor:
    """w_n A_n / sum_n w_n, over the last axis: what the loss multiplies each sample by."""
    if y.weights is None:
        return y.advantages / y.advantages.shape[-1]
    return y.advantages * shares(y.weights)


def shares(weights: Tensor) -> Tensor:
    """w_n / sum_n w_n, over the last axis."""
    return weights / weights.sum(-1, keepdim=True)

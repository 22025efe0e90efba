"""Losses as functions (prediction, target) -> 0-d tensor: the built-in ones and those of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import policies, targets
from maml_cuda.functional import Functional
from maml_cuda.policies import Policy
from maml_cuda.targets import PolicyTarget

Loss = str | Callable[..., Tensor]


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over samples of the cross-entropy of logits [n, classes] and labels [n]."""
    return F.cross_entropy(prediction, target)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over all elements of the squared error.

    Raises:
        ValueError: the shapes differ. torch would broadcast them.
    """
    if prediction.shape != target.shape:  # checks of the data saw the first task's prediction only
        raise ValueError(
            f"the prediction must have the target's shape {list(target.shape)} for mse, got {list(prediction.shape)}"
        )
    # Not F.mse_loss: in torch 2.13, torch.func.jvp of torch.func.grad of it raises.
    return ((prediction - target) ** 2).mean()


def policy_gradient(policy: Policy, target: PolicyTarget) -> Tensor:
    """Either form of the policy-gradient loss; PolicyTarget has the formulas."""
    coefficients = targets.coefficients(target)
    log_prob = policies.log_prob(policy, target.actions)
    if target.old_log_probs is None:
        return -(coefficients * log_prob).sum()
    log_ratio = (log_prob - target.old_log_probs).masked_fill(coefficients == 0, 0)  # exp of padding might overflow
    return -(coefficients * log_ratio.exp()).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    **dict.fromkeys(targets.POLICY_LOSSES, policy_gradient),
}


def objective(loss: Loss) -> Callable[..., Tensor]:
    """The loss as a function (prediction, target), or for a module as a function (parameters, prediction, target)."""
    if isinstance(loss, nn.Module):
        return Functional(loss)
    return LOSSES[loss] if isinstance(loss, str) else loss


def loss_function(loss: Loss) -> Callable[..., Tensor]:
    """The loss as a function (prediction, target); a module is called at its own parameters."""
    function = objective(loss)
    return partial(function, dict(function.module.named_parameters())) if isinstance(function, Functional) else function


def value_of(loss: Callable[..., Any], prediction: Any, target: Any) -> Tensor:
    """Calls a loss.

    Raises:
        TypeError, ValueError: it does not return a 0-d tensor of a real floating-point dtype.
    """
    value = loss(prediction, target)
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must return a 0-d tensor, got {type(value).__name__}")
    if value.dim():
        raise ValueError(
            f"the loss must return a 0-d tensor, got one of shape {list(value.shape)}: losses are means over samples, "
            "as value.mean() is"
        )
    if not value.is_floating_point():
        raise TypeError(f"the loss must return a real floating-point tensor, got {value.dtype}")
    return value

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
from maml_cuda.sample_weights import Weighted
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
    _same_shape(prediction, target)
    # Not F.mse_loss: in torch 2.13, torch.func.jvp of torch.func.grad of it raises.
    return ((prediction - target) ** 2).mean()


def _same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:  # checks of the data saw the first task's prediction only
        raise ValueError(
            f"the prediction must have the target's shape {list(target.shape)} for mse, got {list(prediction.shape)}"
        )


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


def _cross_entropies(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, reduction="none")


def _squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over the elements of each sample."""
    _same_shape(prediction, target)
    return ((prediction - target) ** 2).reshape(len(target), -1).mean(1)


OF_SAMPLES: dict[str, Callable[..., Tensor]] = {"cross_entropy": _cross_entropies, "mse": _squared_errors}


def objective(loss: Loss, of_samples: bool = False) -> Callable[..., Tensor]:
    """The loss as a function (prediction, target), or for a module as a function (parameters, prediction, target).

    of_samples: whether samples have weights, so that it gives the loss of each; those of the user's own do it then.
    """
    if isinstance(loss, nn.Module):
        return Functional(loss)
    return (OF_SAMPLES if of_samples else LOSSES)[loss] if isinstance(loss, str) else loss


def loss_function(loss: Loss, of_samples: bool = False) -> Callable[..., Tensor]:
    """The loss as a function (prediction, target); a module is called at its own parameters."""
    function = objective(loss, of_samples)
    return partial(function, dict(function.module.named_parameters())) if isinstance(function, Functional) else function


def called(loss: Callable[..., Any], prediction: Any, target: Any) -> Any:
    """What a loss returns; where the target is Weighted, the weighted mean of what it returns for the samples."""
    if isinstance(target, Weighted):
        return target.mean(loss(prediction, target.y))
    return loss(prediction, target)


def value_of(loss: Callable[..., Any], prediction: Any, target: Any) -> Tensor:
    """Calls a loss; where the target is Weighted, it is called for the losses of all samples.

    Raises:
        TypeError, ValueError: it does not return a 0-d tensor of a real floating-point dtype.
    """
    value = called(loss, prediction, target)
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

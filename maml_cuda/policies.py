"""Stochastic policies in the form that a model returns them: log-probabilities, divergences and samples.

A categorical policy is its logits, `[..., n, actions]`. A Gaussian policy with independent dimensions is a pair
`(mean, log_std)`: `mean` is `[..., n, action]`; `log_std`, the natural logarithm of the standard deviation, is
`[..., n, action]`, or `[..., action]` if it is the same for all states. All leading axes `...` are batch axes, so these
functions take what `maml.predict` returns for all tasks at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Policy = Tensor | tuple[Tensor, Tensor]


def log_prob(policy: Policy, actions: Tensor) -> Tensor:
    """The logarithm of the probability (categorical) or of the density (Gaussian) of actions.

    Args:
        policy: logits, or (mean, log_std).
        actions: int64 `[..., n]` for a categorical policy, `[..., n, action]` for a Gaussian one.

    Returns:
        `[..., n]`, in nats.
    """
    if isinstance(policy, Tensor):
        return policy.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    mean, log_std = by_state(policy)
    error = (actions - mean) * (-log_std).exp()
    return -(error.square() / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)


def kl_divergence(old: Policy, new: Policy) -> Tensor:
    """The Kullback-Leibler divergence KL(old || new) in each state.

    Args:
        old, new: two policies of the same kind and shapes.

    Returns:
        `[..., n]`, in nats.
    """
    if isinstance(old, Tensor):
        assert isinstance(new, Tensor)
        old_log, new_log = old.log_softmax(-1), new.log_softmax(-1)
        return (old_log.exp() * (old_log - new_log)).sum(-1)
    assert not isinstance(new, Tensor)
    (mean, log_std), (new_mean, new_log_std) = by_state(old), by_state(new)
    variance, precision = (2 * log_std).exp(), (-2 * new_log_std).exp()
    per_dimension = new_log_std - log_std + ((variance + (mean - new_mean).square()) * precision - 1) / 2
    return per_dimension.sum(-1)


def entropy(policy: Policy) -> Tensor:
    """The entropy (categorical) or differential entropy (Gaussian) in each state.

    Args:
        policy: logits, or (mean, log_std).

    Returns:
        `[..., n]`, in nats.
    """
    if isinstance(policy, Tensor):
        log = policy.log_softmax(-1)
        return -(log.exp() * log).sum(-1)
    mean, log_std = by_state(policy)
    return (log_std + (1 + math.log(2 * math.pi)) / 2).expand_as(mean).sum(-1)


def sample(policy: Policy, generator: torch.Generator | None = None) -> Tensor:
    """Draws one action for each state.

    Args:
        policy: logits, or (mean, log_std).
        generator: the random generator, on the policy's device; None: torch's default one.

    Returns:
        int64 `[..., n]` for a categorical policy, `[..., n, action]` for a Gaussian one; detached.
    """
    if isinstance(policy, Tensor):
        chances = policy.detach().softmax(-1)
        drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1, generator=generator)
        return drawn.view(chances.shape[:-1])
    mean, log_std = by_state(policy)
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return (mean + log_std.exp() * noise).detach()


def mean_of(prediction: Policy) -> Tensor:
    """The logits of a categorical policy, the mean of a Gaussian one."""
    return prediction if isinstance(prediction, Tensor) else prediction[0]


def by_state(policy: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and log_std, with log_std in a shape that broadcasts to the mean's."""
    mean, log_std = policy
    return mean, log_std.unsqueeze(-2) if 1 < log_std.dim() < mean.dim() else log_std

"""Advantages: discounted returns, a linear baseline for each task, and generalized advantage estimation.

The baseline is that of rllab (Duan et al. 2016), which the MAML paper uses: ridge regression on the features (s, s^2,
t/100, (t/100)^2, (t/100)^3, 1), fitted to the discounted returns of the same episodes. Generalized advantage estimation
is from Schulman et al. 2016. Sums over time are products with a triangular matrix of discounts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maml_cuda import PolicyTarget
from maml_cuda.rl.sampling import Episodes

RIDGE = 1e-5


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """``sum_j discount^j values[..., t + j]`` over the last axis. Input and output are ``[..., steps]``."""
    steps = torch.arange(values.shape[-1], device=values.device)
    ahead = steps[:, None] - steps  # [j, t]: j - t
    powers = torch.where(ahead >= 0, torch.tensor(discount, dtype=values.dtype) ** ahead.clamp(min=0), 0)
    return values @ powers


def baseline_features(observations: Tensor) -> Tensor:
    """The features of the baseline, float64 ``[tasks, episodes, steps, 2 * observation_size + 4]``.

    Observations are clipped to [-10, 10], as in rllab.
    """
    clipped = observations.double().clamp(-10, 10)
    time = torch.arange(clipped.shape[2], dtype=torch.float64, device=clipped.device) / 100
    powers = torch.stack([time, time**2, time**3, torch.ones_like(time)], -1)
    return torch.cat([clipped, clipped**2, powers.expand(*clipped.shape[:3], 4)], -1)


def baseline_values(episodes: Episodes, returns: Tensor) -> Tensor:
    """The fitted baseline in each state, float64 ``[tasks, episodes, steps]``. After the end of an episode it is 0."""
    features = (baseline_features(episodes.observations) * episodes.alive.unsqueeze(-1)).flatten(1, 2)
    gram, target = features.mT @ features, features.mT @ returns.double().flatten(1).unsqueeze(-1)
    weights = torch.cholesky_solve(target, _cholesky(gram))
    return (features @ weights).view(episodes.alive.shape)


def _cholesky(gram: Tensor) -> Tensor:
    """The Cholesky factor of ``gram + ridge``. The ridge starts at RIDGE and is multiplied by 10 for each task whose
    matrix is not positive definite in floating point, as in rllab.

    Raises:
        ValueError: ``gram`` is not finite.
    """
    broken = (~gram.isfinite()).flatten(1).any(1)
    if broken.any():
        raise ValueError(f"observations must be finite, got NaN or infinity in task {int(broken.nonzero()[0])}")
    ridge = torch.full((len(gram), 1), RIDGE, dtype=gram.dtype, device=gram.device)
    factor: Tensor
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge.expand(-1, gram.shape[-1])))
        if not failed.any():
            return factor
        ridge = torch.where(failed.unsqueeze(-1) > 0, 10 * ridge, ridge)


def advantages(episodes: Episodes, discount: float, gae_lambda: float) -> Tensor:
    """Advantages of all steps, normalised to mean 0 and standard deviation 1 over each task's samples.

    Args:
        episodes: the episodes.
        discount: the discount of rewards, at most 1.
        gae_lambda: the lambda of generalized advantage estimation, at most 1.

    Returns:
        float32 ``[tasks, episodes, steps]``; 0 after the end of an episode.

    Raises:
        ValueError: an observation is not finite.
    """
    rewards = episodes.rewards.double()
    values = baseline_values(episodes, discounted_sums(rewards, discount))
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)  # 0 after the last step
    residuals = rewards + discount * following - values
    raw = discounted_sums(residuals, discount * gae_lambda)
    alive = episodes.alive
    count = alive.sum((1, 2), keepdim=True)
    centred = (raw - (raw * alive).sum((1, 2), keepdim=True) / count) * alive
    deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return (centred / (deviation + 1e-8)).float()


def samples(episodes: Episodes, discount: float, gae_lambda: float, *, ratio: bool) -> tuple[Tensor, PolicyTarget]:
    """The samples of a policy loss.

    Args:
        episodes: the episodes.
        discount: the discount of rewards.
        gae_lambda: the lambda of generalized advantage estimation.
        ratio: True for the likelihood-ratio form, which needs the log-probabilities under the sampling policy; False
            for the score form.

    Returns:
        Observations ``[tasks, samples, observation_size]`` and their PolicyTarget.

    Raises:
        ValueError: a task has no steps.
    """
    if episodes.alive.shape[1] == 0 or not episodes.alive.sum((1, 2)).all():
        task = int((episodes.alive.sum((1, 2)) == 0).nonzero()[0]) if episodes.alive.shape[1] else 0
        raise ValueError(f"episodes must have at least one step in each task, got none in task {task}")
    x, actions, gains, log_probs, weights = episodes.pack(
        episodes.observations,
        episodes.actions,
        advantages(episodes, discount, gae_lambda),
        episodes.log_probs,
        episodes.alive,
    )
    return x, PolicyTarget(actions, gains, log_probs if ratio else None, weights)

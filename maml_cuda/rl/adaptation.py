"""Adaptation in tests: each step samples new episodes and takes one policy-gradient step on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from maml_cuda import FusedMAML
from maml_cuda.rl.advantages import samples
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environment import Environment
from maml_cuda.rl.inner import initial_parameters, inner_step
from maml_cuda.rl.sampling import Episodes, sample_episodes
from maml_cuda.rl.settings import RLSettings

TASKS_AT_ONCE = 20  # bounds memory


def adapt_and_sample(
    maml: FusedMAML,
    environment: Environment,
    goals: Tensor,
    settings: RLSettings,
    generator: Generator,
    clock: Clock,
    steps: int,
) -> Iterator[Episodes]:
    """Samples episodes and adapts the policy, in turn.

    Args:
        maml: the policy.
        environment: the environment.
        goals: ``[tasks, goal_size]``.
        settings: the numbers of episodes and steps, and the inner rates.
        generator: the source of random numbers.
        clock: measures the time.
        steps: the number of adaptation steps.

    Yields:
        The episodes after 0, 1, ..., ``steps`` adaptation steps.
    """
    fast = initial_parameters(maml, len(goals))
    for step in range(steps + 1):
        episodes = sample_episodes(
            environment, goals, fast, settings.test_episodes, settings.horizon, generator, clock,
            tell_goal=settings.tell_goal,
        )  # fmt: skip
        yield episodes
        if step < steps:
            with clock.measure("gradient"):
                x, y = samples(episodes, settings.discount, settings.gae_lambda, ratio=False)
                fast = inner_step(maml, fast, x, y, dict.fromkeys(fast, settings.rate(step)))


def evaluate_returns(
    maml: FusedMAML,
    environment: Environment,
    settings: RLSettings,
    generator: Generator,
    clock: Clock,
    tasks: int,
    steps: int,
) -> Tensor:
    """The mean undiscounted return of each task after 0, 1, ..., ``steps`` adaptation steps, ``[steps + 1, tasks]``."""
    goals = environment.sample_goals(tasks, generator)
    parts = []
    for chunk in goals.split(TASKS_AT_ONCE):
        found = adapt_and_sample(maml, environment, chunk, settings, generator, clock, steps)
        parts.append(torch.stack([episodes.returns.mean(1) for episodes in found]))
    return torch.cat(parts, 1)

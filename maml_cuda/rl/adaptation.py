"""Adaptation in test: fresh episodes at every step, one policy-gradient step on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Generator, Tensor

from maml_cuda import FusedMAML

from .advantages import samples
from .clock import Clock
from .environment import Environment
from .sampling import Episodes, sample_episodes
from .settings import RLSettings

TASKS_AT_ONCE = 20  # bounds memory


def unadapted(maml: FusedMAML, tasks: int) -> dict[str, Tensor]:
    """The policy itself for each task, as views."""
    return {
        name: parameter.detach().unsqueeze(0).expand(tasks, *parameter.shape)
        for name, parameter in maml.model.named_parameters()
    }


def adapt_and_sample(
    maml: FusedMAML,
    environment: Environment,
    goals: Tensor,
    settings: RLSettings,
    generator: Generator,
    clock: Clock,
    steps: int,
) -> Iterator[Episodes]:
    """The episodes after 0, 1, ..., ``steps`` adaptation steps, at rate ``inner_lr`` in the first step and half of it
    in the later ones, as in the paper (section 5.3)."""
    fast: Mapping[str, Tensor] = unadapted(maml, len(goals))
    for step in range(steps + 1):
        episodes = sample_episodes(
            environment, goals, fast, settings.test_episodes, settings.horizon, generator, clock,
            tell_goal=settings.tell_goal,
        )  # fmt: skip
        yield episodes
        if step < steps:
            with clock.on("gradient"):
                x, y = samples(episodes, settings.discount, settings.gae_lambda, ratio=False)
                _, gradient = maml.loss_and_grad(fast, x, y)
            rate = settings.inner_lr if step == 0 else settings.inner_lr / 2
            fast = {name: fast[name] - rate * gradient[name] for name in fast}


def evaluate_returns(
    maml: FusedMAML,
    environment: Environment,
    settings: RLSettings,
    generator: Generator,
    clock: Clock,
    tasks: int,
    steps: int,
) -> Tensor:
    """Mean undiscounted return of each task, ``[steps + 1, tasks]``."""
    goals = environment.sample_goals(tasks, generator)
    parts = []
    for chunk in goals.split(TASKS_AT_ONCE):
        found = adapt_and_sample(maml, environment, chunk, settings, generator, clock, steps)
        parts.append(torch.stack([episodes.returns.mean(1) for episodes in found]))
    return torch.cat(parts, 1)

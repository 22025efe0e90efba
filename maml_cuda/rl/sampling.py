"""Samples episodes with each task's own policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maml_cuda import policies
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environment import Environment
from maml_cuda.rl.policy import act


@dataclass
class Episodes:
    """Episodes of different lengths, padded with zeros to the longest.

    Attributes:
        observations: before each action, ``[tasks, episodes, steps, observation_size]``.
        actions: as drawn from the policy, before clipping, ``[tasks, episodes, steps, action_size]``.
        log_probs: log-probabilities of the actions, ``[tasks, episodes, steps]``.
        rewards: ``[tasks, episodes, steps]``.
        alive: 1 for steps of the episode, 0 for padding, ``[tasks, episodes, steps]``.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    alive: Tensor

    @property
    def returns(self) -> Tensor:
        """The undiscounted return of each episode, ``[tasks, episodes]``."""
        return self.rewards.sum(-1)

    def pack(self, *values: Tensor) -> list[Tensor]:
        """Reshapes ``values`` from ``[tasks, episodes, steps, ...]`` to ``[tasks, samples, ...]``.

        The samples of a task come first, in order; padding follows, up to the number of samples of the longest task.
        """
        alive = self.alive.flatten(1)
        most = int(alive.sum(1).max())
        if bool(alive.all()):
            return [value.flatten(1, 2) for value in values]
        order = alive.argsort(dim=1, descending=True, stable=True)[:, :most]
        packed = []
        for value in values:
            flat = value.flatten(1, 2)
            index = order.view(*order.shape, *[1] * (flat.dim() - 2)).expand(*order.shape, *flat.shape[2:])
            packed.append(flat.gather(1, index))
        return packed


def sample_episodes(
    environment: Environment,
    goals: Tensor,
    fast: Mapping[str, Tensor],
    episodes: int,
    horizon: int,
    generator: Generator,
    clock: Clock,
    *,
    tell_goal: bool = False,
) -> Episodes:
    """Samples episodes of each task.

    Args:
        environment: the environment.
        goals: ``[tasks, goal_size]``.
        fast: each task's parameters of a GaussianPolicy, name -> ``[tasks, *shape]``.
        episodes: episodes per task.
        horizon: the greatest number of steps of an episode.
        generator: the source of random numbers.
        clock: measures the time of the physics and of the policy.
        tell_goal: whether the goal is appended to the observations (the oracle).

    Raises:
        ValueError: see ``Environment.step``.
        FloatingPointError: see ``Environment.step``.
    """
    with _threads_for_physics(environment):
        with clock.measure("physics"):
            observations = environment.reset(goals, episodes, generator)
        repeated_goals = goals.unsqueeze(1).expand(-1, episodes, -1)
        shape = (horizon, len(goals), episodes, environment.action_size)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        seen, actions, rewards, alive = [], [], [], []
        for step in range(horizon):
            with clock.measure("policy"):
                if tell_goal:
                    observations = torch.cat([observations, repeated_goals], -1)
                mean, log_std = act(fast, observations)
                action = mean + log_std.exp().unsqueeze(1) * noise[step]
                seen.append(observations)
                actions.append(action)
                alive.append(environment.alive)
            with clock.measure("physics"):
                observations, reward, _ = environment.step(environment.clip(action))
                rewards.append(reward)
                if not environment.alive.any():
                    break
        with clock.measure("policy"):
            was_alive = torch.stack(alive, 2).float()
            drawn = torch.stack(actions, 2)
            z = noise[: len(actions)].permute(1, 2, 0, 3)
            log_probs = policies.log_prob((torch.zeros_like(z), z.new_zeros(z.shape[-1])), z)
            log_probs = log_probs - log_std.sum(-1)[:, None, None]
            return Episodes(
                torch.stack(seen, 2) * was_alive.unsqueeze(-1),
                drawn * was_alive.unsqueeze(-1),
                log_probs * was_alive,
                torch.stack(rewards, 2) * was_alive,
                was_alive,
            )


@contextmanager
def _threads_for_physics(environment: Environment) -> Iterator[None]:
    """A context in which the physics simulation has torch's threads, and torch has one.

    The products of the policy are short. After each of them, OpenMP's threads would wait actively and take cores from
    the simulation.
    """
    threads, given = torch.get_num_threads(), environment.threads
    environment.threads = given or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        environment.threads = given

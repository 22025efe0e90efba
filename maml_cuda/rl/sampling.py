"""Samples episodes with each task's own policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maml_cuda import policies
from maml_cuda.policies import Policy
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environment import Environment
from maml_cuda.rl.policy import act, draw, noise_of_steps


@dataclass
class Episodes:
    """Episodes of different lengths, padded with zeros to the longest.

    Attributes:
        observations: before each action, ``[tasks, episodes, steps, observation_size]``.
        actions: as drawn from the policy, before clipping, ``[tasks, episodes, steps, action_size]``; int64 ``[tasks,
            episodes, steps]`` if they are discrete.
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
        fast: each task's parameters of a GaussianPolicy or CategoricalPolicy, name -> ``[tasks, *shape]``.
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
        repeated_goals = goals.to(observations.dtype).unsqueeze(1).expand(-1, episodes, -1)
        shape = (len(goals), episodes, environment.action_size)
        noise = noise_of_steps(horizon, shape, environment.discrete, generator)
        seen, found, actions, rewards, alive = [], [], [], [], []
        for step in range(horizon):
            with clock.measure("policy"):
                if tell_goal:
                    observations = torch.cat([observations, repeated_goals], -1)
                policy = act(fast, observations)
                action = draw(policy, noise[step])
                seen.append(observations)
                found.append(policy)
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
            log_probs = _log_probs(found, drawn, noise[: len(actions)])
            return Episodes(
                torch.stack(seen, 2) * was_alive.unsqueeze(-1),
                drawn * (was_alive.long() if environment.discrete else was_alive.unsqueeze(-1)),
                log_probs * was_alive,
                torch.stack(rewards, 2) * was_alive,
                was_alive,
            )


def _log_probs(found: Sequence[Policy], actions: Tensor, noise: Tensor) -> Tensor:
    """The log-probabilities of ``actions [tasks, episodes, steps, ...]``, ``[tasks, episodes, steps]``.

    Those of a Gaussian policy come from the noise ``[steps, tasks, episodes, action_size]`` that drew the actions.
    """
    if isinstance(found[0], Tensor):
        return policies.log_prob(torch.stack([logits for logits in found if isinstance(logits, Tensor)], 2), actions)
    z = noise.permute(1, 2, 0, 3)
    log_probs = policies.log_prob((torch.zeros_like(z), z.new_zeros(z.shape[-1])), z)
    return log_probs - found[0][1].sum(-1)[:, None, None]


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

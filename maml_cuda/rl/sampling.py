"""Episodes of each task's own policy, as the losses take them."""

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
    """Episodes of different lengths, padded with zeros up to the longest."""

    observations: Tensor  # [tasks, episodes, steps, observation_size], before the action
    actions: Tensor  # [tasks, episodes, steps, action_size] as the policy drew them, not yet clipped to the box
    log_probs: Tensor  # [tasks, episodes, steps]
    rewards: Tensor  # [tasks, episodes, steps]
    alive: Tensor  # [tasks, episodes, steps]: 1 in the episode, 0 after its end

    @property
    def returns(self) -> Tensor:
        """Undiscounted, ``[tasks, episodes]``."""
        return self.rewards.sum(-1)

    def pack(self, *values: Tensor) -> list[Tensor]:
        """Each of ``values`` ``[tasks, episodes, steps, ...]`` as ``[tasks, samples, ...]``: every task's own samples
        first, in order, then padding up to the task that has most."""
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
    """``episodes`` episodes of each task, of at most ``horizon`` steps.

    Args:
        goals: ``[tasks, goal_size]``.
        fast: each task's parameters of a GaussianPolicy, name -> ``[tasks, *shape]``.
        clock: told what the physics and the policy took.
        tell_goal: the policy observes the goal too, after the environment's own observation (the oracle).

    Raises:
        ValueError, FloatingPointError: as ``Environment.step``.
    """
    with _threads_for_physics(environment):
        with clock.measure("physics"):
            observations = environment.reset(goals, episodes, generator)
        told = goals.unsqueeze(1).expand(-1, episodes, -1)
        shape = (horizon, len(goals), episodes, environment.action_size)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        seen, actions, rewards, alive = [], [], [], []
        for step in range(horizon):
            with clock.measure("policy"):
                if tell_goal:
                    observations = torch.cat([observations, told], -1)
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
    """Inside, the physics has torch's threads and torch has one: the policy's products are short, and OpenMP's threads,
    which go on waiting awake after each, would take the cores from the physics."""
    threads, given = torch.get_num_threads(), environment.threads
    environment.threads = given or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        environment.threads = given

"""What every environment of the paper's third experiment is: episodes of many tasks that step together.

Tensors are ``[tasks, episodes, ...]``. An environment is given a goal for each task and never draws one by itself, so
that the same tasks can be run again by another policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Step(NamedTuple):
    """The result of one step of an environment.

    Attributes:
        observations: [tasks, episodes, observation_size] float32.
        rewards: [tasks, episodes] float32; 0 where the episode had ended before.
        done: [tasks, episodes] bool: whether the episode ends with this step.
    """

    observations: Tensor
    rewards: Tensor
    done: Tensor


class Environment(ABC):
    """``tasks * episodes`` copies of one environment, each task with a goal of its own.

    Subclasses set the four sizes and write ``_reset`` and ``_step``; this class checks what goes in and what comes out.
    """

    name: str
    observation_size: int
    action_size: int
    goal_size: int
    action_limit: float = 1.0  # actions are in the box [-action_limit, action_limit]^action_size
    threads: int | None = None  # of the physics; None: as many as torch has

    goals: Tensor
    alive: Tensor

    @abstractmethod
    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Goals ``[tasks, goal_size]`` of new tasks."""

    @abstractmethod
    def _reset(self, episodes: int, generator: Generator) -> Tensor:
        """The first observations ``[tasks, episodes, observation_size]``."""

    @abstractmethod
    def _step(self, actions: Tensor) -> Step:
        """One step of the episodes that are alive."""

    def reset(self, goals: Tensor, episodes: int, generator: Generator) -> Tensor:
        """Starts ``episodes`` episodes of each task; returns ``[tasks, episodes, observation_size]``.

        ValueError where ``goals`` are not finite numbers ``[tasks, goal_size]``.
        """
        if goals.dim() != 2 or goals.shape[1] != self.goal_size or not len(goals):
            raise ValueError(f"goals must be [tasks, {self.goal_size}] for {self.name}, got {list(goals.shape)}")
        if not goals.isfinite().all():
            raise ValueError(f"goals must be finite, got {_first(~goals.isfinite(), goals)}")
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        self.goals = goals
        self.alive = torch.ones(len(goals), episodes, dtype=torch.bool, device=goals.device)
        return self._reset(episodes, generator)

    def clip(self, actions: Tensor) -> Tensor:
        """A policy's actions, whose unit is the box's half side, as actions of the box (rllab's ``normalize``)."""
        return actions.clamp(-1, 1) * self.action_limit

    def step(self, actions: Tensor) -> Step:
        """One step with ``actions`` ``[tasks, episodes, action_size]``; those of ended episodes are not looked at.

        ValueError, naming the task, for an action outside the box; FloatingPointError, naming the task, where the
        simulator returns what is not a finite number.
        """
        shape = (*self.alive.shape, self.action_size)
        if actions.shape != shape:
            raise ValueError(f"actions must be {list(shape)} for {self.name}, got {list(actions.shape)}")
        outside = ~(actions.abs() <= self.action_limit) & self.alive.unsqueeze(-1)  # NaN is outside
        if outside.any():
            raise ValueError(
                f"actions must be in the box of {self.name}, -{self.action_limit:g} to {self.action_limit:g}, "
                f"got {_first(outside, actions)} in {self._which(outside)}"
            )
        result = self._step(actions)
        broken = ~(result.rewards.isfinite() & result.observations.isfinite().all(-1)) & self.alive
        if broken.any():
            raise FloatingPointError(
                f"the simulator of {self.name} must return finite numbers, got reward {_first(broken, result.rewards)}"
                f" and observations up to {_first(broken, result.observations.abs().amax(-1))} in {self._which(broken)}"
            )
        self.alive = self.alive & ~result.done
        return result

    def _which(self, mask: Tensor) -> str:
        """The first place of ``mask`` in words."""
        task, episode = (int(index) for index in mask.nonzero()[0, :2])
        goal = ", ".join(f"{value:.3g}" for value in self.goals[task].tolist())
        return f"task {task} (goal {goal}), episode {episode}"


def _first(mask: Tensor, values: Tensor) -> float:
    return float(values[mask][0])

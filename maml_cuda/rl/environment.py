"""The interface of all environments: episodes of many tasks that step together.

Tensors are ``[tasks, episodes, ...]``. The caller passes a goal for each task, so that another policy can be run on the
same tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Step(NamedTuple):
    """The result of one step.

    Attributes:
        observations: float32 ``[tasks, episodes, observation_size]``.
        rewards: float32 ``[tasks, episodes]``; 0 for episodes that had ended before.
        done: bool ``[tasks, episodes]``; whether the episode ends with this step.
    """

    observations: Tensor
    rewards: Tensor
    done: Tensor


class Environment(ABC):
    """``tasks * episodes`` copies of one environment. Each task has its own goal.

    Subclasses set the name and the sizes, and implement ``sample_goals``, ``_reset`` and ``_step``. This class checks
    inputs and outputs.

    Attributes:
        name: the name in ``ENVIRONMENTS``.
        observation_size: the number of observed values.
        action_size: the number of values of an action.
        goal_size: the number of values of a goal.
        action_limit: actions are in ``[-action_limit, action_limit]^action_size``.
        threads: threads of the physics simulation; None: as many as torch has.
        goals: the goals of the current tasks, ``[tasks, goal_size]``.
        alive: whether each episode is still running, bool ``[tasks, episodes]``.
    """

    name: str
    observation_size: int
    action_size: int
    goal_size: int
    action_limit: float = 1.0
    threads: int | None = None

    goals: Tensor
    alive: Tensor

    @abstractmethod
    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Draws the goals of new tasks, ``[tasks, goal_size]``."""

    @abstractmethod
    def _reset(self, episodes: int, generator: Generator) -> Tensor:
        """The first observations ``[tasks, episodes, observation_size]``."""

    @abstractmethod
    def _step(self, actions: Tensor) -> Step:
        """One step of the episodes that are running."""

    def reset(self, goals: Tensor, episodes: int, generator: Generator) -> Tensor:
        """Starts new episodes.

        Args:
            goals: the goal of each task, ``[tasks, goal_size]``.
            episodes: episodes per task.
            generator: the source of random numbers for the first states.

        Returns:
            The first observations, ``[tasks, episodes, observation_size]``.

        Raises:
            ValueError: ``goals`` has another shape or holds NaN or infinity, or ``episodes`` is less than 1.
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
        """Converts actions of a policy to actions of the environment: clips them to [-1, 1] and scales them to the
        action range, like rllab's ``normalize``.
        """
        return actions.clamp(-1, 1) * self.action_limit

    def step(self, actions: Tensor) -> Step:
        """Takes one step.

        Args:
            actions: ``[tasks, episodes, action_size]``, within the action range. Actions of episodes that have ended
                are ignored.

        Returns:
            Observations, rewards and ends of the episodes.

        Raises:
            ValueError: the shape is wrong, or an action is out of range; the error names the task.
            FloatingPointError: the simulator returned NaN or infinity; the error names the task.
        """
        shape = (*self.alive.shape, self.action_size)
        if actions.shape != shape:
            raise ValueError(f"actions must be {list(shape)} for {self.name}, got {list(actions.shape)}")
        outside = ~(actions.abs() <= self.action_limit) & self.alive.unsqueeze(
            -1
        )  # written so that NaN counts as outside
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
        """A description of the first task and episode in ``mask``."""
        task, episode = (int(index) for index in mask.nonzero()[0, :2])
        goal = ", ".join(f"{value:.3g}" for value in self.goals[task].tolist())
        return f"task {task} (goal {goal}), episode {episode}"


def _first(mask: Tensor, values: Tensor) -> float:
    return float(values[mask][0])

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

    Subclasses set the sizes, and implement ``sample_goals``, ``_reset`` and ``_step``. All random numbers come from the
    generators that these are given. This class checks inputs and outputs.

    Attributes:
        name: a short name, for messages; the class's own if it is not set.
        observation_size: the number of observed values.
        action_size: the number of values of an action; if ``discrete``, of the actions to choose from.
        goal_size: the number of values of a goal.
        discrete: whether an action is one of ``action_size``, an integer; otherwise it is a vector.
        action_limit: actions that are vectors are in ``[-action_limit, action_limit]^action_size``.
        threads: threads of the physics simulation; None: as many as torch has.
        goals: the goals of the current tasks, ``[tasks, goal_size]``.
        alive: whether each episode is still running, bool ``[tasks, episodes]``.
    """

    name: str
    observation_size: int
    action_size: int
    goal_size: int
    discrete: bool = False
    action_limit: float = 1.0
    threads: int | None = None

    goals: Tensor
    alive: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Draws the goals of new tasks, ``[tasks, goal_size]``, floating point."""

    @abstractmethod
    def _reset(self, episodes: int, generator: Generator) -> Tensor:
        """Starts ``episodes`` episodes of each task of ``self.goals``.

        Returns:
            The first observations, float32 ``[tasks, episodes, observation_size]``.
        """

    @abstractmethod
    def _step(self, actions: Tensor) -> Step:
        """One step of the episodes in ``self.alive``. What it returns for the others must be finite, and is ignored.

        Args:
            actions: float32 ``[tasks, episodes, action_size]``, or int64 ``[tasks, episodes]`` if ``discrete``.
        """

    @property
    def spaces(self) -> str:
        """The sizes of observations, actions and goals, in words."""
        return f"observations [{self.observation_size}], {self._actions()}, goals [{self.goal_size}]"

    def _actions(self) -> str:
        if self.discrete:
            return f"{self.action_size} discrete actions"
        return f"actions [{self.action_size}] within {self.action_limit:g}"

    def reset(self, goals: Tensor, episodes: int, generator: Generator) -> Tensor:
        """Starts new episodes.

        Args:
            goals: the goal of each task, ``[tasks, goal_size]``.
            episodes: episodes per task.
            generator: the source of random numbers for the first states.

        Returns:
            The first observations, ``[tasks, episodes, observation_size]``.

        Raises:
            ValueError: ``goals`` has another shape or holds NaN or infinity, ``episodes`` is less than 1, or the
                environment returns observations of another shape.
            FloatingPointError: an observation is NaN or infinity; the error names the task.
        """
        if goals.dim() != 2 or goals.shape[1] != self.goal_size or not len(goals):
            raise ValueError(f"goals must be [tasks, {self.goal_size}] for {self.name}, got {list(goals.shape)}")
        if not goals.isfinite().all():
            raise ValueError(f"goals must be finite, got {_first(~goals.isfinite(), goals)}")
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        self.goals = goals
        self.alive = torch.ones(len(goals), episodes, dtype=torch.bool, device=goals.device)
        observations = self._reset(episodes, generator)
        self._check("observations", observations, torch.float32, self.observation_size)
        self._check_finite(observations, None)
        return observations

    def clip(self, actions: Tensor) -> Tensor:
        """Converts actions of a policy to actions of the environment: clips vectors to [-1, 1] and scales them to the
        action range, like rllab's ``normalize``.
        """
        return actions if self.discrete else actions.clamp(-1, 1) * self.action_limit

    def step(self, actions: Tensor) -> Step:
        """Takes one step.

        Args:
            actions: ``[tasks, episodes, action_size]``, within the action range; int64 ``[tasks, episodes]``, from 0 to
                ``action_size - 1``, if ``discrete``. Actions of episodes that have ended are ignored.

        Returns:
            Observations, rewards and ends of the episodes.

        Raises:
            ValueError: the shape is wrong, or an action is out of range; the error names the task. Or the environment
                returns tensors of another shape or type.
            FloatingPointError: the simulator returned NaN or infinity; the error names the task.
        """
        self._check_actions(actions)
        result = self._step(actions)
        if not isinstance(result, Step):
            raise ValueError(f"_step of {self.name} must return a Step, got {type(result).__name__}")
        self._check("observations", result.observations, torch.float32, self.observation_size)
        self._check("rewards", result.rewards, torch.float32)
        self._check("done", result.done, torch.bool)
        self._check_finite(result.observations, result.rewards)
        self.alive = self.alive & ~result.done
        return result

    def _check_actions(self, actions: Tensor) -> None:
        shape = tuple(self.alive.shape) if self.discrete else (*self.alive.shape, self.action_size)
        if actions.shape != shape:
            raise ValueError(f"actions must be {list(shape)} for {self.name}, got {list(actions.shape)}")
        if self.discrete:
            if actions.dtype != torch.int64:
                raise ValueError(f"actions must be int64 for {self.name}, got {actions.dtype}")
            outside = ((actions < 0) | (actions >= self.action_size)) & self.alive
            box = f"0 to {self.action_size - 1} for {self.name}"
        else:
            # written so that NaN counts as outside
            outside = ~(actions.abs() <= self.action_limit) & self.alive.unsqueeze(-1)
            box = f"in the box of {self.name}, -{self.action_limit:g} to {self.action_limit:g}"
        if outside.any():
            raise ValueError(f"actions must be {box}, got {_first(outside, actions)} in {self._which(outside)}")

    def _check(self, what: str, found: Tensor, dtype: torch.dtype, *size: int) -> None:
        """Raises ValueError if the environment returned another type or shape than ``[tasks, episodes, *size]``."""
        shape = [*self.alive.shape, *size]
        if not isinstance(found, Tensor) or found.dtype != dtype or list(found.shape) != shape:
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{what} of {self.name} must be {dtype} {shape}, got {got}")

    def _check_finite(self, observations: Tensor, rewards: Tensor | None) -> None:
        broken = ~observations.isfinite().all(-1)
        if rewards is not None:
            broken |= ~rewards.isfinite()
        if broken.any():
            got = "" if rewards is None else f"reward {_first(broken, rewards)} and "
            raise FloatingPointError(
                f"the simulator of {self.name} must return finite numbers, got {got}"
                f"observations up to {_first(broken, observations.abs().amax(-1))} in {self._which(broken)}"
            )

    def _which(self, mask: Tensor) -> str:
        """A description of the first task and episode in ``mask``."""
        task, episode = (int(index) for index in mask.nonzero()[0, :2])
        goal = ", ".join(f"{value:.3g}" for value in self.goals[task].tolist())
        return f"task {task} (goal {goal}), episode {episode}"


def _first(mask: Tensor, values: Tensor) -> float:
    return float(values[mask][0])

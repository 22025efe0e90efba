"""One task of an environment as a ``gymnasium.Env``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Generator, Tensor

from maml_cuda.rl.environments import make_environment


class SingleTask(gymnasium.Env):
    """One task of an environment as a ``gymnasium.Env``.

    Actions must be within ``action_space``; they are not clipped.

    Args:
        name: one of ``maml_cuda.rl.ENVIRONMENTS``.
        goal: ``[goal_size]``; None: a new goal is drawn at every reset. ``reset(options={"goal": ...})`` sets the goal
            of one episode.
        horizon: the number of steps after which an episode is truncated.

    Raises:
        ValueError: there is no environment of this name; in ``step``, an action is out of range.
        ModuleNotFoundError: the environment needs the extra [rl], which is not installed.
    """

    def __init__(self, name: str, goal: Tensor | None = None, horizon: int = 200) -> None:
        self.environment = make_environment(name)
        self._goal = goal
        self._horizon = horizon
        self._steps = 0
        limit, size = self.environment.action_limit, self.environment.action_size
        self.action_space = gymnasium.spaces.Box(-limit, limit, (size,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.environment.observation_size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: the seed of the goal and of the first state; None: continue with the current random state.
            options: ``{"goal": ...}`` sets the goal of this episode.

        Returns:
            The observation ``[observation_size]``, and ``{"goal": [goal_size]}``.
        """
        super().reset(seed=seed)
        generator = Generator().manual_seed(int(self.np_random.integers(2**63)))
        goal = (options or {}).get("goal", self._goal)
        if goal is None:
            goals = self.environment.sample_goals(1, generator)
        else:
            goals = torch.as_tensor(goal, dtype=torch.float32).view(1, -1)
        self._steps = 0
        observation = self.environment.reset(goals, 1, generator)
        return observation[0, 0].numpy().copy(), {"goal": goals[0].numpy().copy()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one step.

        Args:
            action: ``[action_size]``, within ``action_space``.

        Returns:
            Observation, reward, whether the episode has ended, whether it is truncated, and an empty dict.

        Raises:
            ValueError: the action is out of range.
        """
        actions = torch.as_tensor(action, dtype=torch.float32).view(1, 1, -1)
        observations, rewards, done = self.environment.step(actions)
        self._steps += 1
        return observations[0, 0].numpy().copy(), float(rewards), bool(done), self._steps >= self._horizon, {}

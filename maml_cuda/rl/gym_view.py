"""One task of an environment as gymnasium knows it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Generator, Tensor

from maml_cuda.rl.environments import make_environment


class SingleTask(gymnasium.Env):
    """The environment ``name`` with one goal, for whatever takes a ``gymnasium.Env``.

    Args:
        name: one of ``maml_cuda.rl.ENVIRONMENTS``.
        goal: ``[goal_size]``; None: drawn anew at every reset; ``reset(options={"goal": ...})`` gives one episode's.
        horizon: steps after which an episode is truncated.

    Actions are in the environment's own box (``action_space``), not clipped: one outside raises ValueError.
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
        actions = torch.as_tensor(action, dtype=torch.float32).view(1, 1, -1)
        observations, rewards, done = self.environment.step(actions)
        self._steps += 1
        return observations[0, 0].numpy().copy(), float(rewards), bool(done), self._steps >= self._horizon, {}

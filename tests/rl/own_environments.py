"""Environments of a user: two classics of gymnasium with a goal, and one environment written both ways."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from gymnasium.wrappers import TimeLimit

from maml_cuda.rl import Environment, Step


class PendulumGoal(PendulumEnv):
    """A pendulum whose goal is an angle, which is not observed."""

    def sample_task(self, rng: np.random.Generator) -> dict:
        return {"angle": rng.uniform(-1, 1), "name": np.arange(2)}

    def set_task(self, task: dict) -> None:
        assert task["name"].tolist() == [0, 1]
        self.angle = task["angle"]

    def step(self, action):
        angle, speed = self.state
        observation, _, terminated, truncated, info = super().step(action)
        return observation, -abs(angle - self.angle) - 0.1 * abs(speed), terminated, truncated, info


class CartPoleGoal(CartPoleEnv):
    """A cart whose goal is a place; tasks as in learn2learn's MetaEnv."""

    def sample_tasks(self, number: int) -> list[float]:
        return [float(place) for place in self.np_random.uniform(-1, 1, number)]

    def set_task(self, task: float) -> None:
        self.place = task

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1 - abs(observation[0] - self.place), terminated, truncated, info


def short_cart_pole() -> gymnasium.Env:
    return TimeLimit(CartPoleGoal(), 3)


MOVES = torch.tensor([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.1]], dtype=torch.float64)


class Point(gymnasium.Env):
    """A point that moves to a goal in the plane from a drawn start, one episode at a time."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-0.1, 0.1, (2,), np.float32)

    def sample_task(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-0.5, 0.5, 2)

    def set_task(self, task: np.ndarray) -> None:
        self.goal = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.1, 0.1, 2)
        return self.place, {}

    def step(self, action):
        move = MOVES[action].numpy() if isinstance(self.action_space, spaces.Discrete) else action
        self.place = self.place + move
        away = abs(self.place[0] - self.goal[0]) + abs(self.place[1] - self.goal[1])
        return self.place, -away, away < 0.1, False, {}


class DiscretePoint(Point):
    action_space = spaces.Discrete(3)


class BatchedPoint(Environment):
    """All points of ``Point`` at once."""

    observation_size = action_size = goal_size = 2
    action_limit = 0.1

    def sample_goals(self, tasks, generator):
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return torch.from_numpy(np.array([rng.uniform(-0.5, 0.5, 2) for _ in range(tasks)]))

    def _reset(self, episodes, generator):
        seeds = torch.randint(2**31, (len(self.goals) * episodes,), generator=generator).tolist()
        starts = np.array([np.random.default_rng(seed).uniform(-0.1, 0.1, 2) for seed in seeds])
        self.places = torch.from_numpy(starts).view(len(self.goals), episodes, 2)
        return self.places.float()

    def _step(self, actions):
        moves = MOVES[actions] if self.discrete else actions.double()
        self.places = torch.where(self.alive.unsqueeze(-1), self.places + moves, self.places)
        away = (self.places - self.goals.unsqueeze(1)).abs()
        distance = away[..., 0] + away[..., 1]
        return Step(self.places.float(), -distance.float(), distance < 0.1)


class DiscreteBatchedPoint(BatchedPoint):
    action_size = 3
    discrete = True

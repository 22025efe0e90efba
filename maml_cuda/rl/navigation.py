"""2D navigation of the MAML paper (section 5.3): a point moves to a goal that it does not observe."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from maml_cuda.rl.environment import Environment, Step


class Navigation(Environment):
    """2D navigation. All points are one tensor, on any device.

    Goal: uniform on [-0.5, 0.5]^2. Start: the origin. Observation: the position. Action: the displacement, in [-0.1,
    0.1]^2. Reward: minus the distance to the goal after the move, as in the authors' code (the paper says squared
    distance). An episode ends within 0.01 of the goal in both coordinates.
    """

    name = "navigation"
    observation_size = 2
    action_size = 2
    goal_size = 2
    action_limit = 0.1

    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """Goals ``[tasks, 2]``, uniform on [-0.5, 0.5]^2, on the generator's device."""
        return torch.rand(tasks, 2, generator=generator, device=generator.device) - 0.5

    def _reset(self, episodes: int, generator: Generator) -> Tensor:
        self.positions = torch.zeros(len(self.goals), episodes, 2, device=self.goals.device)
        return self.positions

    def _step(self, actions: Tensor) -> Step:
        self.positions = torch.where(self.alive.unsqueeze(-1), self.positions + actions, self.positions)
        away = self.positions - self.goals.unsqueeze(1)
        return Step(self.positions, -away.norm(dim=-1) * self.alive, (away.abs() < 0.01).all(-1))

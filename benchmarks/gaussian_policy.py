"""The Gaussian policy of Finn, Abbeel, Levine (2017), section 5.3, and a meta-batch: 20 tasks of 2000 samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maml_cuda import PolicyTarget, policies

TASKS, SAMPLES, RATE = 20, 2000, 0.1
LOSS = "gaussian_policy_gradient"


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.log_std


def episode(model: nn.Module, tasks: int, samples: int) -> list:
    """A meta-batch of actions of the policy: x_spt, y_spt (score function), x_qry, y_qry (likelihood ratio)."""
    data: list = []
    for ratio in (False, True):
        x = torch.rand(tasks, samples, 2) - 0.5
        with torch.no_grad():
            policy = model(x)
            actions = policies.sample(policy)
            old = policies.log_prob(policy, actions) if ratio else None
        data += [x, PolicyTarget(actions, torch.randn(tasks, samples), old)]
    return data


def doubled(data: list) -> list:
    """The meta-batch in float64."""
    return [
        d.double() if isinstance(d, Tensor) else PolicyTarget(*(None if t is None else t.double() for t in d))
        for d in data
    ]

"""Small policies and their samples, for the tests of policy gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maml_cuda import PolicyTarget

LOSSES = {"gaussian": "gaussian_policy_gradient", "categorical": "categorical_policy_gradient"}


class Gaussian(nn.Module):
    """A small smooth network gives the mean; log_std is one parameter for all states. form: how forward returns it."""

    def __init__(self, form: str = "plain", inputs: int = 3, hidden: int = 7, dims: int = 2) -> None:
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, dims))
        self.log_std = nn.Parameter(0.3 * torch.randn(dims))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.body(x)
        if self.form == "expand_as":
            return mean, self.log_std.expand_as(mean)
        if self.form == "expand":
            return mean, self.log_std.expand(x.shape[0], -1)
        if self.form == "floored":
            return mean, torch.clamp(self.log_std, min=-0.05).expand_as(mean)
        return mean, self.log_std


def policy(kind: str, **options: object) -> nn.Module:
    if kind == "gaussian":
        return Gaussian(**options).double()  # type: ignore[arg-type]
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def target(kind: str, tasks: int, n: int, ratio: bool, ragged: bool) -> PolicyTarget:
    """Actions that the policy might have drawn, with old log-probabilities of plausible size."""
    gaussian = kind == "gaussian"
    actions = torch.randn(tasks, n, 2).double() if gaussian else torch.randint(4, (tasks, n))
    old = 0.3 * torch.randn(tasks, n).double() - (3 if gaussian else 1.4) if ratio else None
    weights = torch.rand(tasks, n).double() if ragged else None
    if weights is not None and n > 1:
        weights[0, n // 2 :] = 0
    return PolicyTarget(actions, torch.randn(tasks, n).double(), old, weights)


def episode(
    kind: str, n_support: int = 5, n_query: int = 6, tasks: int = 3, forms: tuple[bool, bool] = (False, True),
    ragged: bool = True,
) -> list:  # fmt: skip
    """x_spt, y_spt, x_qry, y_qry. forms: for support and query, whether the loss has the likelihood ratio."""
    data: list = []
    for n, ratio in zip((n_support, n_query), forms, strict=True):
        data += [torch.randn(tasks, n, 3).double(), target(kind, tasks, n, ratio, ragged)]
    return data


def cast(data: list, dtype: torch.dtype) -> list:
    """Casts the floating-point tensors to dtype."""

    def one(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.is_floating_point() else t

    return [one(d) if isinstance(d, Tensor) else PolicyTarget(*map(one, d)) for d in data]  # type: ignore[arg-type]


def pick(data: list, index: object) -> list:
    """Indexes every tensor of data."""
    return [
        d[index] if isinstance(d, Tensor) else PolicyTarget(*(None if t is None else t[index] for t in d))  # type: ignore
        for d in data
    ]

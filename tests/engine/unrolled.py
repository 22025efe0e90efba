"""An unrolled inner loop in plain torch, with a support set for each step; and small models and data for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

STEPS = 3


def part(tree: Any, *index: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t[index], tree)


def unrolled(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: list[Any],
    rate: Callable[[str, int], Any],
    steps: int = STEPS,
    *,
    adapted: Callable[[str], bool] = lambda _: True,
    first_order: bool = False,
    weights: list[float] | None = None,
    task_weights: Tensor | None = None,
) -> tuple[Tensor, list[dict[str, Tensor]], list[list[Tensor]]]:
    """The mean query loss, with its graph; of each task the parameters at the end, and the support losses."""
    x_spt, y_spt, x_qry, y_qry = data
    theta = dict(model.named_parameters())
    names = [n for n, p in theta.items() if p.requires_grad and adapted(n)]
    total, ends, inner = torch.zeros(()), [], []
    tasks = len(x_qry)
    for t in range(tasks):
        phi, losses = dict(theta), []
        values = [] if weights is None else [loss(functional_call(model, phi, x_qry[t]), part(y_qry, t))]
        for k in range(steps):
            value = loss(functional_call(model, phi, x_spt[k, t]), part(y_spt, k, t))
            losses.append(value.detach())
            grads = torch.autograd.grad(value, [phi[n] for n in names], create_graph=not first_order, retain_graph=True)
            phi = {**phi, **{n: phi[n] - rate(n, k) * g for n, g in zip(names, grads, strict=True)}}
            if weights is not None:
                values.append(loss(functional_call(model, phi, x_qry[t]), part(y_qry, t)))
        if weights is None:
            value = loss(functional_call(model, phi, x_qry[t]), part(y_qry, t))
        else:
            value = sum(w * v for w, v in zip(weights, values, strict=True))
        total = total + (value / tasks if task_weights is None else value * task_weights[t])
        ends.append(phi)
        inner.append(losses)
    return total, ends, inner


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).mean()


def sets(
    sample: tuple[int, ...], target: tuple[int, ...] | None, steps: int = STEPS, tasks: int = 3, n: int = 5,
    n_qry: int = 4,
) -> list[Tensor]:  # fmt: skip
    """x_spt, y_spt, x_qry, y_qry; target None: labels of 4 classes."""
    data = []
    for axes in ((steps, tasks, n), (tasks, n_qry)):
        data.append(torch.randn(*axes, *sample).double())
        data.append(torch.randint(4, axes) if target is None else torch.randn(*axes, *target).double())
    return data


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Softplus(), nn.AvgPool2d(2),
        nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(27, 4),
    ).double()  # fmt: skip


class Field(nn.Module):
    """Layers that read values of x alone (the encoding) and of frozen parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(3).double(), requires_grad=False)
        self.body = mlp(6, 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        phase = x * self.frequencies.exp()
        return self.body(torch.cat([phase.sin(), phase.cos()], -1))

"""An independent meta-gradient with inner optimizers: the loop and each update written out, differentiated by autograd.

The formulas are those of torch.optim's documentation. Square roots are torch's own, so no second moment may be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

State = dict[str, Any]
H = Mapping[str, Any]


def sgd(p: Tensor, g: Tensor, s: State, t: int, lr: Any, h: H) -> Tensor:
    if "weight_decay" in h:
        g = g + h["weight_decay"] * p
    if "momentum" not in h:
        return p - lr * g
    if "momentum_buffer" in s:
        s["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + (1 - h.get("dampening", 0)) * g
    else:
        s["momentum_buffer"] = g
    return p - lr * (g + h["momentum"] * s["momentum_buffer"] if h.get("nesterov") else s["momentum_buffer"])


def adam(p: Tensor, g: Tensor, s: State, t: int, lr: Any, h: H) -> Tensor:
    b1, b2 = h.get("betas", (0.9, 0.999))
    g = g + h.get("weight_decay", 0) * p
    s["exp_avg"] = b1 * s.get("exp_avg", 0) + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s.get("exp_avg_sq", 0) + (1 - b2) * g**2
    m, v = s["exp_avg"] / (1 - b1**t), s["exp_avg_sq"] / (1 - b2**t)
    return p - lr * m / (v.sqrt() + h.get("eps", 1e-8))


def adamw(p: Tensor, g: Tensor, s: State, t: int, lr: Any, h: H) -> Tensor:
    rest = {name: value for name, value in h.items() if name != "weight_decay"}
    return adam(p, g, s, t, lr, rest) - lr * h.get("weight_decay", 0.01) * p


def adamax(p: Tensor, g: Tensor, s: State, t: int, lr: Any, h: H) -> Tensor:
    b1, b2 = h.get("betas", (0.9, 0.999))
    g = g + h.get("weight_decay", 0) * p
    s["exp_avg"] = b1 * s.get("exp_avg", 0) + (1 - b1) * g
    before, now = b2 * s.get("exp_inf", torch.zeros_like(g)), g.abs() + h.get("eps", 1e-8)
    s["exp_inf"] = torch.where(before > now, before, now)
    return p - lr / (1 - b1**t) * s["exp_avg"] / s["exp_inf"]


def rmsprop(p: Tensor, g: Tensor, s: State, t: int, lr: Any, h: H) -> Tensor:
    a = h.get("alpha", 0.99)
    g = g + h.get("weight_decay", 0) * p
    s["square_avg"] = a * s.get("square_avg", 0) + (1 - a) * g**2
    v = s["square_avg"]
    if h.get("centered"):
        s["grad_avg"] = a * s.get("grad_avg", 0) + (1 - a) * g
        v = v - s["grad_avg"] ** 2
    d = g / (v.sqrt() + h.get("eps", 1e-8))
    if "momentum" in h:
        d = s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", 0) + d
    return p - lr * d


def adagrad(p: Tensor, g: Tensor, s: State, t: int, lr: Any, h: H) -> Tensor:
    g = g + h.get("weight_decay", 0) * p
    s["sum"] = s.get("sum", h.get("initial_accumulator_value", 0)) + g**2
    return p - lr / (1 + (t - 1) * h.get("lr_decay", 0)) * g / (s["sum"].sqrt() + h.get("eps", 1e-10))


RULES: dict[str, Callable[..., Tensor]] = {
    "sgd": sgd, "adam": adam, "adamw": adamw, "adamax": adamax, "rmsprop": rmsprop, "adagrad": adagrad,
}  # fmt: skip


def clipped(grads: dict[str, Tensor], norm: float | None, value: float | None) -> dict[str, Tensor]:
    if norm is not None:
        total = torch.cat([g.flatten() for g in grads.values()]).norm()
        if norm / (total + 1e-6) < 1:
            grads = {name: g * norm / (total + 1e-6) for name, g in grads.items()}
    if value is not None:
        grads = {name: torch.where(g.abs() > value, value * g.sign(), g) for name, g in grads.items()}
    return grads


def meta_gradient(
    model: nn.Module,
    data: list[Tensor],
    steps: int,
    step: Callable[[str, Tensor, Tensor, State, int], Tensor],
    wanted: Mapping[str, Tensor],
    *,
    adapted: list[str] | None = None,
    states: Callable[[str], State] = lambda name: {},
    norm: float | None = None,
    value: float | None = None,
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    first_order: bool = False,
    truncate: int | None = None,
    query_weights: list[float] | None = None,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """The mean query loss, its gradients in `wanted` and the parameters, and the adapted parameters of each task.

    Args:
        data: x_spt, y_spt, x_qry, y_qry of a mean cross-entropy.
        step: (name, parameter, gradient, state, k) -> parameter; it writes the state.
        states: the state of a parameter before the first step.
        truncate: the state after the steps before the last so many, and what they add to the parameters, is constant.
    """
    theta = dict(model.named_parameters())
    names = list(theta) if adapted is None else adapted
    losses, after = [], []
    for x_spt, y_spt, x_qry, y_qry in zip(*data, strict=True):
        phi, state = dict(theta), {name: dict(states(name)) for name in names}
        query = torch.zeros((), dtype=torch.float64)
        for k in range(steps):
            if query_weights is not None:
                query = query + query_weights[k] * F.cross_entropy(functional_call(model, phi, (x_qry,)), y_qry)
            loss = F.cross_entropy(functional_call(model, phi, (x_spt,)), y_spt)
            found = torch.autograd.grad(loss, [phi[n] for n in names], create_graph=True)
            grads = {n: g.detach() if first_order else g for n, g in zip(names, found, strict=True)}
            grads = clipped(transform(grads), norm, value)
            new = {n: step(n, phi[n], grads[n], state[n], k) for n in names}
            if truncate is not None and k < steps - truncate:
                new = {n: theta[n] + (p - theta[n]).detach() for n, p in new.items()}
                state = {n: {key: t.detach() for key, t in part.items()} for n, part in state.items()}
            phi = phi | new
        last = F.cross_entropy(functional_call(model, phi, (x_qry,)), y_qry)
        losses.append(last if query_weights is None else query + query_weights[-1] * last)
        after.append({n: p.detach() for n, p in phi.items()})
    total = torch.stack(losses).mean()
    leaves = {**theta, **wanted}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return total.detach(), found, after

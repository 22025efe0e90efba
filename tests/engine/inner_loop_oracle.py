"""The meta-gradient of a random inner loop (inner_loop_cases.py), unrolled in plain torch: shares no code with the
package. One task at a time; autograd differentiates through all of it, but for iMAML, whose linear system is written
out with a whole Hessian, and Reptile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.engine.inner_loop_cases import Case, Group
from tests.given_masks import philox

Tensors = dict[str, Tensor]


@dataclass
class Expected:
    """loss, task_losses, support_losses and logits as of MetaOutput; gradients in the order of Case.wanted()."""

    loss: Tensor
    task_losses: Tensor
    support_losses: Tensor
    logits: Tensor
    gradients: list[Tensor]


def root(x: Tensor) -> Tensor:
    """Its derivative at 0 is 0."""
    positive = x != 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def step(group: Group, h: Mapping[str, Any], p: Tensor, g: Tensor, s: Tensors, t: int) -> Tensor:
    """Step t = 1, 2, ... of torch.optim's documentation. It writes the state s."""
    lr, decay = h["lr"], h.get("weight_decay", 0)
    if group.rule == "adamw":
        p = p - lr * decay * p
    else:
        g = g + decay * p
    match group.rule:
        case "sgd":
            if "momentum" not in h:
                return p - lr * g
            if "momentum_buffer" in s:
                s["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
            else:
                s["momentum_buffer"] = g
            return p - lr * (g + h["momentum"] * s["momentum_buffer"] if group.flag else s["momentum_buffer"])
        case "adam" | "adamw":
            s["exp_avg"] = s.get("exp_avg", 0) * h["beta1"] + g * (1 - h["beta1"])
            s["exp_avg_sq"] = s.get("exp_avg_sq", 0) * h["beta2"] + g**2 * (1 - h["beta2"])
            mean, square = s["exp_avg"] / (1 - h["beta1"] ** t), s["exp_avg_sq"] / (1 - h["beta2"] ** t)
            return p - lr * mean / (root(square) + h["eps"])
        case "adamax":
            s["exp_avg"] = s.get("exp_avg", 0) * h["beta1"] + g * (1 - h["beta1"])
            before, now = h["beta2"] * s.get("exp_inf", torch.zeros_like(g)), g.abs() + h["eps"]
            s["exp_inf"] = torch.where(before > now, before, now)
            return p - lr / (1 - h["beta1"] ** t) * s["exp_avg"] / s["exp_inf"]
        case "rmsprop":
            s["square_avg"] = s.get("square_avg", 0) * h["alpha"] + g**2 * (1 - h["alpha"])
            square = s["square_avg"]
            if group.flag:
                s["grad_avg"] = s.get("grad_avg", 0) * h["alpha"] + g * (1 - h["alpha"])
                square = square - s["grad_avg"] ** 2
            d = g / (root(square) + h["eps"])
            if "momentum" in h:
                d = s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", 0) + d
            return p - lr * d
        case _:
            s["sum"] = s.get("sum", h["initial_accumulator_value"]) + g**2
            return p - lr / (1 + (t - 1) * h["lr_decay"]) * g / (root(s["sum"]) + h["eps"])


def clipped(grads: Tensors, norm: float | None, value: float | None) -> Tensors:
    if norm is not None:
        total = root(sum(g.square().sum() for g in grads.values()))  # type: ignore[arg-type]
        if norm / (total + 1e-6) < 1:
            grads = {name: g * (norm / (total + 1e-6)) for name, g in grads.items()}
    if value is not None:
        grads = {name: torch.where(g.abs() > value, value * g.sign(), g) for name, g in grads.items()}
    return grads


def called(model: nn.Module, phi: Tensors, x: Tensor) -> Tensor:
    """model(x) at other parameters. (torch.func.functional_call does not put back those of a module that a model has
    under two names.)"""
    at = [(model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in phi]
    before = [holder[key] for holder, key in at]
    try:
        for (holder, key), p in zip(at, phi.values(), strict=True):
            holder[key] = p  # type: ignore[assignment]
        return model(x)
    finally:
        for (holder, key), p in zip(at, before, strict=True):
            holder[key] = p


def value(case: Case, phi: Tensors, x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of a set, and the prediction, with zeros for padding."""
    if case.backwards:
        x, y, w = (None if t is None else t.flip(0) for t in (x, y, w))  # type: ignore[assignment]
    if w is None:
        prediction = called(case.model, phi, x)
        return case.loss.each(prediction, y).mean(), prediction.flip(0) if case.backwards else prediction
    counts = w.detach() > 0
    prediction = called(case.model, phi, x[counts])
    whole = prediction.new_zeros(len(w), *prediction.shape[1:]).index_put((counts,), prediction)
    whole = whole.flip(0) if case.backwards else whole
    return (w[counts] * case.loss.each(prediction, y[counts])).sum() / w[counts].sum(), whole


def minibatches(seed: int, task: int, n: int, batch: int, steps: int) -> list[list[int]]:
    """The samples that each step of a task sees (maml_cuda/minibatches.py says which)."""
    each = n // batch
    chosen: list[list[int]] = []
    for epoch in range(-(-steps // each)):
        blocks = np.arange(-(-n // 2), dtype=np.uint64)
        words = np.broadcast_arrays(*philox([blocks, 2**32 - 1, epoch, task], [seed % 2**32, seed >> 32]))
        numbers = [(int(words[2 * (i % 2)][i // 2]), int(words[2 * (i % 2) + 1][i // 2]) // 2) for i in range(n)]
        order = sorted(range(n), key=numbers.__getitem__)
        chosen += [order[i * batch : (i + 1) * batch] for i in range(each)]
    return chosen[:steps]


def support(case: Case, task: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """x, y and weights of each step."""
    x, y, w = case.data[0], case.data[1], case.spt_weights
    if case.per_step:
        return [(x[k, task], y[k, task], None if w is None else w[k, task]) for k in range(steps)]
    whole = x[task], y[task], None if w is None else w[task]
    if case.support_batch is None:
        return [whole] * max(steps, 1)
    drawn = minibatches(seed, task, x.shape[1], case.support_batch, steps)
    return [(whole[0][i], whole[1][i], None if whole[2] is None else whole[2][i]) for i in drawn]


def inner_loop(case: Case, task: int, steps: int, seed: int) -> tuple[list[Tensors], list[Tensor]]:
    """phi_0 .. phi_K of a task, with their graph, and the support losses."""
    theta = dict(case.model.named_parameters())
    state = {name: dict(group.state.get(name, {})) for group in case.groups for name in group.names}
    path, losses = [theta], []
    sets = support(case, task, steps, seed)
    for k in range(steps):
        phi = path[-1]
        loss, _ = value(case, phi, *sets[k])
        losses.append(loss.detach())
        found = torch.autograd.grad(loss, [phi[n] for n in case.adapted], create_graph=True)
        grads = dict(zip(case.adapted, found, strict=True))
        if case.proximal is not None:
            grads = {n: g + case.proximal * (phi[n] - theta[n]) for n, g in grads.items()}
        if case.first_order:
            grads = {n: g.detach() for n, g in grads.items()}
        grads = clipped(case.transformed(grads), case.clip_norm, case.clip_value)
        phi = dict(phi)
        for group in case.groups:
            for name in group.names:
                h = {key: hyper.at(name, k) for key, hyper in group.hypers.items()} | {"lr": case.rate.at(name, k)}
                phi[name] = step(group, h, phi[name], grads[name], state[name], group.taken + k + 1)
        if case.truncate is not None and k < steps - case.truncate:
            phi = {n: theta[n] + (p - theta[n]).detach() for n, p in phi.items()}
            state = {n: {key: t.detach() for key, t in part.items()} for n, part in state.items()}
        path.append(phi)
    return path, losses


def meta_gradient(case: Case, seed: int) -> Expected:
    """seed: that of the minibatches."""
    tasks = len(case.data[2])
    weights = torch.full((tasks,), 1 / tasks, dtype=torch.float64) if case.task_weights is None else case.task_weights
    wanted = case.wanted()
    gradients = [torch.zeros_like(t) for t in wanted]
    task_losses, support_losses, logits = [], [], []
    for task in range(tasks):
        x, y, w = case.data[2][task], case.data[3][task], None if case.qry_weights is None else case.qry_weights[task]
        path, losses = inner_loop(case, task, case.steps, seed)
        last, prediction = value(case, path[-1], x, y, w)
        query = last
        if case.query_weights is not None:
            query = sum(c * value(case, phi, x, y, w)[0] for c, phi in zip(case.query_weights, path, strict=True))  # type: ignore[assignment]
        if case.kind == "reptile":
            theta = dict(case.model.named_parameters())
            of_task: list[Tensor | None] = [
                next((theta[n] - path[-1][n] for n in case.adapted if theta[n] is t), None) for t in wanted
            ]
        elif case.kind == "implicit":
            of_task = implicit(case, task, path[-1], seed, wanted)
        else:
            of_task = list(torch.autograd.grad(query, wanted, allow_unused=True))
        for total, g in zip(gradients, of_task, strict=True):
            if g is not None:
                total += weights[task] * g.detach()
        task_losses.append(query.detach())
        logits.append(prediction.detach())
        support_losses.append(torch.stack(losses) if losses else torch.zeros(0).double())
    values = torch.stack(task_losses)
    return Expected((weights * values).sum(), values, torch.stack(support_losses), torch.stack(logits), gradients)


def implicit(case: Case, task: int, at: Tensors, seed: int, wanted: list[Tensor]) -> list[Tensor | None]:
    """(I + H / lambda) x = b by conjugate gradients, with the whole Hessian H (Rajeswaran et al. 2019)."""
    theta = dict(case.model.named_parameters())
    phi = {n: p.detach().requires_grad_() if n in case.adapted else p for n, p in at.items()}
    moved, proximal = [phi[n] for n in case.adapted], case.proximal
    assert proximal is not None
    w = None if case.qry_weights is None else case.qry_weights[task]
    query, _ = value(case, phi, case.data[2][task], case.data[3][task], w)
    inner, _ = value(case, phi, *support(case, task, 1, seed)[0])
    b = torch.cat([g.flatten() for g in torch.autograd.grad(query, moved, retain_graph=True)])
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(inner, moved, create_graph=True)])

    def row(e: Tensor) -> Tensor:
        found = torch.autograd.grad(slope, moved, e, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    matrix = torch.eye(len(b)).double()
    if slope.requires_grad:
        matrix = matrix + torch.stack([row(e) for e in torch.eye(len(b)).double()]) / proximal
    x = conjugate_gradients(matrix, b, case.cg_steps)
    others = [t for t in wanted if not any(t is theta[n] for n in case.adapted)]
    scalar = query - slope @ x / proximal
    rest = iter(torch.autograd.grad(scalar, others, allow_unused=True) if others else ())
    parts = x.split([p.numel() for p in moved])
    of = {id(theta[n]): part.view_as(theta[n]) for n, part in zip(case.adapted, parts, strict=True)}
    return [of[id(t)] if id(t) in of else next(rest) for t in wanted]


def conjugate_gradients(matrix: Tensor, b: Tensor, steps: int, tolerance: float = 1e-6) -> Tensor:
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(steps):
        if r.norm() <= tolerance * b.norm():
            break
        alpha = (r @ r) / (p @ matrix @ p)
        x, after = x + alpha * p, r - alpha * (matrix @ p)
        p, r = after + (after @ after) / (r @ r) * p, after
    return x

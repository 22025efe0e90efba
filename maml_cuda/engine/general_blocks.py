"""The building blocks of the general path, at parameters that are each task's own, and its Fisher-vector product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from maml_cuda import policies, pytrees
from maml_cuda.functional import Functional, detached
from maml_cuda.losses import value_of
from maml_cuda.pytrees import Tree
from maml_cuda.reference import inner_loop, query_prediction, sets_of_task
from maml_cuda.sample_weights import without_padding
from maml_cuda.targets import Target
from maml_cuda.updates import InnerUpdate


def loss_and_grad(
    model: Functional, loss: Callable[..., Tensor], fast: Mapping[str, Tensor], names: list[str], x: Tree, y: Target
) -> tuple[Tensor, dict[str, Tensor]]:
    """For each task, the loss at its own parameters and the gradient in those of them that `names` lists.

    Args:
        fast: each task's parameters, name -> [tasks, *shape].
        x, y: [tasks, samples, ...]; y may be Weighted.

    Returns:
        Losses [tasks], and name -> gradient [tasks, *shape], detached.
    """
    losses, gradients = [], []
    for t in range(pytrees.tasks(x)):
        value, grads, _ = _gradient(model, loss, fast, names, x, y, t, create_graph=False)
        losses.append(value.detach())
        gradients.append(grads)
    return torch.stack(losses), _stacked(names, gradients)


def hvp(
    model: Functional, loss: Callable[..., Tensor], fast: Mapping[str, Tensor], names: list[str], x: Tree, y: Target,
    v: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """For each task, the Hessian of the loss at its own parameters times v: H v = d(<dL/dphi, v>)/dphi.

    Args:
        fast: phi, each task's parameters, name -> [tasks, *shape].
        names: the parameters in which the loss is differentiated.
        x, y: [tasks, samples, ...].
        v: name -> [tasks, *shape]; a name that is missing is a zero.

    Returns:
        name -> product [tasks, *shape], for `names`, detached.
    """
    products = []
    for t in range(pytrees.tasks(x)):
        _, grads, phi = _gradient(model, loss, fast, names, x, y, t, create_graph=True)
        with torch.enable_grad():
            slope = _inner_product(names, grads, {n: d[t] for n, d in v.items()})
        if isinstance(slope, Tensor) and slope.requires_grad:
            result: tuple[Tensor | None, ...] = torch.autograd.grad(slope, [phi[n] for n in names], allow_unused=True)
        else:
            result = (None,) * len(names)
        products.append([torch.zeros_like(phi[n]) if g is None else g for n, g in zip(names, result, strict=True)])
    return _stacked(names, products)


def fisher_vector_product(
    model: Functional,
    loss: Callable[..., Tensor],
    inner: InnerUpdate,
    names: list[str],
    x_spt: Tensor,
    y_spt: Target,
    x_qry: Tensor,
    v: Mapping[str, Tensor],
    weights: Tensor,
    steps: int,
    first_order: bool,
    sets: int = 1,
) -> dict[str, Tensor]:
    """The Hessian-vector product of the KL divergence between adapted policies, for trust regions (TRPO).

    Let pi_theta be a task's policy on its query states after the inner loop from theta. The function of theta' that is
    differentiated twice, at theta' = theta, is

        mean over tasks of sum_n weights_n KL(pi_theta(x_n) || pi_theta'(x_n)).

    Its gradient in the policy's outputs is zero at theta' = theta. So its Hessian is J^T F J: J is the Jacobian of the
    outputs in theta, F the Hessian of the divergence in the outputs (Schulman, Levine, Moritz, Jordan, Abbeel 2015,
    appendix C). In this form no layer is differentiated three times; torch's third derivative of BatchNorm is wrong or
    missing.

    Args:
        inner: the update of the adapted parameters, whose tensors are held fixed.
        names: the parameters theta in which the divergence is differentiated.
        x_spt, y_spt: support sets, [tasks, n_support, ...].
        x_qry: query states, [tasks, n_query, ...].
        v: name -> tensor of the parameter's shape.
        weights: [tasks, n_query], which sum to 1 in each task.
        first_order: the inner gradients are constants.
        sets: support sets of a task, as in meta_step.

    Returns:
        name -> tensor of the parameter's shape, for `names`, detached.
    """
    theta = {n: p.detach().requires_grad_(n in names) for n, p in model.module.named_parameters()}
    fixed = inner.mapped(Tensor.detach)
    differentiated = [theta[name] for name in names]
    total = [torch.zeros_like(p) for p in differentiated]
    for t in range(len(x_qry)):
        x, y = sets_of_task(x_spt, t, sets), sets_of_task(y_spt, t, sets)
        path, _ = inner_loop(model, loss, theta, fixed, x, y, steps, first_order, task=t, per_step=sets > 1)
        with torch.enable_grad(), model.differentiable_twice():
            policy = query_prediction(model, path, steps, x_qry[t], t)
            new = pytrees.mapped(lambda p: p.detach().requires_grad_(p.requires_grad), policy)
            outputs, leaves = ([p for p in pytrees.tensors(tree) if p.requires_grad] for tree in (policy, new))
            if not outputs:
                continue  # no output depends on these parameters
            divergence = (weights[t] * policies.kl_divergence(detached(policy), new)).sum()
            # s is the divergence's gradient in the leaves. ds/dleaves = F, so <J^T s, v> = <s, J v> has gradient F J v.
            s = torch.autograd.grad(divergence, leaves, create_graph=True)
            jt_s = torch.autograd.grad(outputs, differentiated, s, create_graph=True, allow_unused=True)
            slope = _inner_product(names, jt_s, v)
            if not isinstance(slope, Tensor):
                continue
            fj_v = torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True)
        jt_fj_v = torch.autograd.grad(outputs, differentiated, fj_v, allow_unused=True)
        for so_far, g in zip(total, jt_fj_v, strict=True):
            if g is not None:
                so_far += g / pytrees.tasks(x_qry)
    return dict(zip(names, total, strict=True))


def _inner_product(names: list[str], gradient: Sequence[Tensor | None], v: Mapping[str, Tensor]) -> Tensor | int:
    """<gradient, v>, the derivative in the direction v. Complex numbers count as pairs of real ones, as in torch."""
    pairs = ((g, v[n].detach()) for n, g in zip(names, gradient, strict=True) if g is not None and n in v)
    return sum((g.conj() * d).real.sum() for g, d in pairs)


def _gradient(
    model: Functional, loss: Callable[..., Tensor], fast: Mapping[str, Tensor], names: list[str], x: Tree, y: Target,
    task: int, create_graph: bool,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """One task's loss at its own parameters, its gradient in `names`, and these parameters, as leaves of the graph."""
    phi = {n: p[task].detach().requires_grad_(n in names) for n, p in fast.items()}
    twice = model.differentiable_twice() if create_graph else nullcontext()
    with torch.enable_grad(), twice, model.of_pass(task, 0):
        x, y = without_padding(pytrees.of_task(x, task), pytrees.of_task(y, task))
        value = value_of(loss, model(phi, x), y)
        grads = torch.autograd.grad(value, [phi[n] for n in names], create_graph=create_graph, allow_unused=True)
    return value, [torch.zeros_like(phi[n]) if g is None else g for n, g in zip(names, grads, strict=True)], phi


def _stacked(names: list[str], rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """name -> [tasks, *shape], from one row of tensors for each task."""
    return {n: torch.stack([row[i].detach() for row in rows]) for i, n in enumerate(names)}

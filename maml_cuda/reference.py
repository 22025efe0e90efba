"""MAML by plain autograd, one task at a time, for any module and any loss: the general path, and the oracle.

Every answer of the fused path has its twin here, written as the paper has it: an inner loop of
`torch.autograd.grad(create_graph=True)` and a backward through it (Finn, Abbeel, Levine 2017, equation 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from maml_cuda import policies, pytrees
from maml_cuda.batch_norm import at_step, stepwise_names
from maml_cuda.functional import Functional, detached, precision
from maml_cuda.losses import Loss, objective, value_of
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates, Rate, read_rates
from maml_cuda.targets import Target


def adapted_names(model: nn.Module, adapt_params: Callable[[str], bool] | Iterable[str] | None) -> list[str]:
    """Names of the trainable parameters that the inner loop changes, in the model's order. By default all but those
    that have a slot for each step."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if adapt_params is None:
        stepwise = stepwise_names(model)
        return [name for name in trainable if name not in stepwise]
    if callable(adapt_params):
        return [name for name in trainable if adapt_params(name)]
    chosen = set(adapt_params)
    return [name for name in trainable if name in chosen]


def inner_loop(
    model: Functional,
    loss: Callable[..., Tensor],
    theta: Mapping[str, Tensor],
    rates: Mapping[str, Rate],
    x: Tree,
    y: Target,
    steps: int,
    first_order: bool,
    differentiable: bool = True,
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """phi_0 .. phi_steps and the support losses of one task; a graph back to theta where `differentiable`.

    theta must not be a user's leaves, whose hooks would see the inner loop's gradients. Rates count in theta's dtype.

    Raises:
        ValueError: an adapted parameter (a key of `rates`) that the support loss does not depend on.
    """
    phi: dict[str, Tensor] = dict(theta)
    losses = []
    with torch.enable_grad():
        if not differentiable:
            phi = {name: p.detach().requires_grad_(name in rates) for name, p in phi.items()}
        second_order = differentiable and not first_order
        path = [phi]
        for step in range(steps):
            with at_step(model.module, step), model.differentiable_twice() if second_order else nullcontext():
                value = value_of(loss, model(phi, x), y)
            grads = torch.autograd.grad(
                value,
                [phi[name] for name in rates],
                create_graph=second_order,
                retain_graph=second_order or None,
                allow_unused=True,
            )
            losses.append(value.detach())
            phi = dict(phi)
            for (name, rate), g in zip(rates.items(), grads, strict=True):
                if g is None:
                    raise unreached([name])
                step_size = rate.at(step)
                if isinstance(step_size, Tensor):
                    step_size = step_size.to(g.dtype.to_real())
                if not second_order:
                    g = g.detach()
                if not differentiable:
                    step_size = step_size.detach() if isinstance(step_size, Tensor) else step_size
                    phi[name] = (phi[name].detach() - step_size * g).requires_grad_()
                else:
                    phi[name] = phi[name] - step_size * g
            path.append(phi)
    return path, losses


def unreached(names: list[str]) -> ValueError:
    return ValueError(
        f"adapted parameter {', '.join(names)} does not reach the support loss: every adapted parameter must; "
        "leave it out with adapt_params"
    )


def meta_gradient(
    model: nn.Module,
    loss: Loss,
    x_spt: Tree,
    y_spt: Target,
    x_qry: Tree,
    y_qry: Target,
    inner_lr: float | Tensor | Mapping[str, float | Tensor] | InnerRates,
    inner_steps: int,
    first_order: bool = False,
    adapt_params: Callable[[str], bool] | Iterable[str] | None = None,
    query_weights: Tensor | Sequence[float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean query loss over tasks after `inner_steps` steps, and its exact gradient.

    Args:
        model: any module; its `.grad` fields are not touched.
        loss: a name that FusedMAML takes, or (prediction, target) -> scalar.
        x_spt, y_spt, x_qry, y_qry: [tasks, samples, ...], or pytrees of tensors [tasks, ...] where model and loss take
            them; a policy-gradient loss takes PolicyTargets.
        inner_lr: every form of FusedMAML's.
        query_weights: [inner_steps + 1]; the loss of a task is the sum of weight k times its query loss at phi_k.

    Returns:
        The loss (0-d, detached), and name -> gradient of every trainable parameter that reaches the loss; learned
        rates stand under `inner_lr` or `inner_lr.<name>`, a loss module's parameters under `loss.<name>`.
    """
    adapted = adapted_names(model, adapt_params)
    parameters = dict(model.named_parameters())
    rates = read_rates(inner_lr, {name: parameters[name].shape for name in adapted}, inner_steps)
    wanted: dict[str, Tensor] = {name: p for name, p in parameters.items() if p.requires_grad}
    if isinstance(inner_lr, Tensor):
        wanted["inner_lr"] = inner_lr
    elif isinstance(inner_lr, (Mapping, InnerRates)):
        wanted.update({f"inner_lr.{name}": r for name, r in inner_lr.items() if isinstance(r, Tensor)})
    if isinstance(loss, nn.Module):
        wanted.update({f"loss.{name}": p for name, p in loss.named_parameters()})
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    tasks = pytrees.tasks(x_spt)
    total, _, _, _, gradients = meta_step(
        Functional(model), objective(loss), rates, list(wanted.values()), x_spt, y_spt, x_qry, y_qry, inner_steps,
        first_order, [1 / tasks] * tasks, None if query_weights is None else [float(w) for w in query_weights],
    )  # fmt: skip
    return total, {name: g for name, g in zip(wanted, gradients, strict=True) if g is not None}


def meta_step(
    model: Functional,
    loss: Callable[..., Tensor],
    rates: Mapping[str, Rate],
    wanted: list[Tensor],
    x_spt: Tree,
    y_spt: Target,
    x_qry: Tree,
    y_qry: Target,
    steps: int,
    first_order: bool,
    weights: Iterable[float | Tensor],
    query_weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tree | None, Tensor, list[Tensor | None]]:
    """One meta-step, one task's graph at a time: loss = sum_t weights[t] * query loss of t, and its gradients.

    query_weights: [steps + 1], or None: the query loss of a task is the sum of weight k times the one at phi_k.

    Twins stand in for `wanted`, so that hooks of theirs see neither the inner loop nor the single tasks. Where a loss
    of the user's, or a forward, holds one of them itself, its gradient there counts too.

    Returns:
        loss (0-d), task_losses [tasks], predictions (trees.stacked, or None where they cannot be), support_losses
        [tasks, steps], all detached, and the gradient of each tensor of `wanted`, or None for one that does not reach
        the loss.
    """
    total: float | Tensor = 0.0
    task_losses, predictions, support_losses = [], [], []
    # A learned rate that no step uses (steps = 0) has a gradient: zero.
    of_rates = {id(rate.value) for rate in rates.values()}
    gradients: list[Tensor | None] = [torch.zeros_like(t) if id(t) in of_rates else None for t in wanted]
    dtype = precision(p for _, p in model.module.named_parameters())
    twins = {id(t): t.detach().to(dtype if id(t) in of_rates else t.dtype).requires_grad_() for t in wanted}

    def twin(t: Tensor) -> Tensor:
        return twins.get(id(t), t)

    both = [*map(twin, wanted), *wanted]
    theta = {name: twin(p) for name, p in model.module.named_parameters()}
    rates = {name: replace(r, value=twin(r.value)) if isinstance(r.value, Tensor) else r for name, r in rates.items()}
    x_spt, y_spt, x_qry, y_qry = (pytrees.mapped(twin, part) for part in (x_spt, y_spt, x_qry, y_qry))
    if isinstance(loss, Functional):
        loss = partial(loss, {name: twin(p) for name, p in loss.module.named_parameters()})
    for t, weight in enumerate(weights):
        path, inner = inner_loop(
            model,
            loss,
            theta,
            rates,
            pytrees.of_task(x_spt, t),
            pytrees.of_task(y_spt, t),
            steps,
            first_order,
            differentiable=bool(wanted),
        )
        x, target = pytrees.of_task(x_qry, t), pytrees.of_task(y_qry, t)
        with torch.set_grad_enabled(bool(wanted)):
            prediction = query(model, path, steps, x)
            if query_weights is None:
                value = value_of(loss, prediction, target)
            else:
                value = sum(  # type: ignore[assignment]
                    w * value_of(loss, prediction if k == steps else query(model, path, k, x), target)
                    for k, w in enumerate(query_weights)
                    if w
                )
        if wanted:
            for i, g in enumerate(torch.autograd.grad(value, both, allow_unused=True)):
                if g is not None:
                    share, i = weight * g, i % len(wanted)
                    so_far = gradients[i]
                    gradients[i] = share if so_far is None else so_far + share
        task_losses.append(value.detach())
        predictions.append(_or_none(pytrees.detached, prediction))
        support_losses.append(torch.stack(inner) if inner else value.detach().new_zeros(0))
        total = total + (weight.detach() if isinstance(weight, Tensor) else weight) * value.detach()
    assert isinstance(total, Tensor)  # data_checks.py refuses a call without tasks
    gradients = [None if g is None else g.to(t.dtype) for t, g in zip(wanted, gradients, strict=True)]
    outputs = _or_none(pytrees.stacked, predictions)
    return total, torch.stack(task_losses), outputs, torch.stack(support_losses), gradients


def _or_none(put_together: Callable[[str, Tree], Tree], predictions: Tree) -> Tree | None:
    """None of what only a loss of the user's can take: no pytrees of tensors, or not alike in all tasks."""
    try:
        return put_together("the model's output", predictions)
    except (TypeError, ValueError):
        return None


def query(model: Functional, path: list[dict[str, Tensor]], k: int, x: Tree) -> Tree:
    """The prediction at phi_k, whose per-step layers read the slot of the step before."""
    with at_step(model.module, max(k - 1, 0)):
        return model(path[k], x)


def loss_and_grad(
    model: Functional,
    loss: Callable[..., Tensor],
    fast: Mapping[str, Tensor],
    names: list[str],
    x: Tree,
    y: Target,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per task: the loss at its own parameters [tasks], and the gradients by `names` [tasks, *shape]."""
    losses, gradients = [], []
    for t in range(pytrees.tasks(x)):
        value, grads, _ = _gradient(model, loss, fast, names, x, y, t, create_graph=False)
        losses.append(value.detach())
        gradients.append(grads)
    return torch.stack(losses), _stacked(names, gradients)


def hvp(
    model: Functional,
    loss: Callable[..., Tensor],
    fast: Mapping[str, Tensor],
    names: list[str],
    x: Tree,
    y: Target,
    v: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Per task: the Hessian of the loss at its own parameters times v, by `names` [tasks, *shape]."""
    products = []
    for t in range(pytrees.tasks(x)):
        _, grads, at = _gradient(model, loss, fast, names, x, y, t, create_graph=True)
        with torch.enable_grad():
            along = _along(names, grads, {n: d[t] for n, d in v.items()})
        if isinstance(along, Tensor) and along.requires_grad:
            result: tuple[Tensor | None, ...] = torch.autograd.grad(along, [at[n] for n in names], allow_unused=True)
        else:
            result = (None,) * len(names)
        products.append([torch.zeros_like(at[n]) if g is None else g for n, g in zip(names, result, strict=True)])
    return _stacked(names, products)


def fisher_vector_product(
    model: Functional,
    loss: Callable[..., Tensor],
    rates: Mapping[str, Rate],
    names: list[str],
    x_spt: Tensor,
    y_spt: Target,
    x_qry: Tensor,
    v: Mapping[str, Tensor],
    weights: Tensor,
    steps: int,
    first_order: bool,
) -> dict[str, Tensor]:
    """The Hessian, at theta, of the mean over tasks of KL(adapted policy at theta || adapted policy), times v.

    It is J^T F J v, with the Jacobian J of the policy's outputs and the divergence's Hessian F in them, as its gradient
    in them is zero. So no layer is differentiated a third time, which torch does wrong, or refuses, in BatchNorm.

    weights: [tasks, n_query], which sum to 1 in each task.
    """
    theta = {n: p.detach().requires_grad_(n in names) for n, p in model.module.named_parameters()}
    fixed = {
        name: replace(r, value=r.value.detach()) if isinstance(r.value, Tensor) else r for name, r in rates.items()
    }
    at = [theta[name] for name in names]
    total = [torch.zeros_like(p) for p in at]
    for t in range(len(x_spt)):
        path, _ = inner_loop(model, loss, theta, fixed, x_spt[t], pytrees.of_task(y_spt, t), steps, first_order)
        with torch.enable_grad(), model.differentiable_twice():
            policy = query(model, path, steps, x_qry[t])
            new = pytrees.mapped(lambda p: p.detach().requires_grad_(p.requires_grad), policy)
            outputs, leaves = ([p for p in pytrees.tensors(tree) if p.requires_grad] for tree in (policy, new))
            if not outputs:
                continue  # the policy does not depend on them
            divergence = (weights[t] * policies.kl_divergence(detached(policy), new)).sum()
            slopes = torch.autograd.grad(divergence, leaves, create_graph=True)
            along = _along(names, torch.autograd.grad(outputs, at, slopes, create_graph=True, allow_unused=True), v)
            if not isinstance(along, Tensor):
                continue
            pushed = torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)
        for so_far, g in zip(total, torch.autograd.grad(outputs, at, pushed, allow_unused=True), strict=True):
            if g is not None:
                so_far += g / pytrees.tasks(x_spt)
    return dict(zip(names, total, strict=True))


def _along(names: list[str], gradient: Sequence[Tensor | None], v: Mapping[str, Tensor]) -> Tensor | int:
    """The derivative in the direction v, whose gradient is the Hessian's product with v: of complex numbers by both
    parts, as torch's gradients are."""
    pairs = ((g, v[n].detach()) for n, g in zip(names, gradient, strict=True) if g is not None and n in v)
    return sum((g.conj() * d).real.sum() for g, d in pairs)


def _gradient(
    model: Functional,
    loss: Callable[..., Tensor],
    fast: Mapping[str, Tensor],
    names: list[str],
    x: Tree,
    y: Target,
    task: int,
    create_graph: bool,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    at = {n: p[task].detach().requires_grad_(n in names) for n, p in fast.items()}
    with torch.enable_grad(), model.differentiable_twice() if create_graph else nullcontext():
        value = value_of(loss, model(at, pytrees.of_task(x, task)), pytrees.of_task(y, task))
        grads = torch.autograd.grad(value, [at[n] for n in names], create_graph=create_graph, allow_unused=True)
    return value, [torch.zeros_like(at[n]) if g is None else g for n, g in zip(names, grads, strict=True)], at


def _stacked(names: list[str], rows: list[list[Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([row[i].detach() for row in rows]) for i, n in enumerate(names)}

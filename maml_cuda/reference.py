"""MAML by plain autograd, one task at a time, for any module and any loss.

This is the reference that the tests compare the fused path and the general path with. For each task, with support loss
L_spt, query loss L_qry and rate alpha_k of inner step k:

    phi_0     = theta
    phi_{k+1} = phi_k - alpha_k * dL_spt(phi_k)/dphi_k,    k = 0 .. K-1

    meta-loss     = mean over tasks of L_qry(phi_K)
    meta-gradient = d(meta-loss)/d(theta)

(Finn, Abbeel, Levine 2017, equation 1 and algorithm 1.) autograd differentiates through the inner loop, because the
inner gradients are computed with `create_graph=True`. At first order (FOMAML, section 5.2 of the paper) they are
constants instead. Parameters that are not adapted have alpha_k = 0: they are in the meta-gradient but do not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from maml_cuda import implicit, meta_gradients, minibatches, pytrees
from maml_cuda.batch_norm import at_step, stepwise_names
from maml_cuda.functional import Functional, leaves_between, precision
from maml_cuda.gradient_transforms import GradientTransform
from maml_cuda.losses import Loss, objective, value_of
from maml_cuda.masks import Seed
from maml_cuda.meta_gradients import UNROLLED, MetaGradient
from maml_cuda.optim import Groups, Optimizer, read
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates
from maml_cuda.sample_weights import Weighted, with_padding, with_weights, without_padding
from maml_cuda.targets import Target
from maml_cuda.updates import InnerUpdate


def adapted_names(model: nn.Module, adapt_params: Callable[[str], bool] | Iterable[str] | None) -> list[str]:
    """Names of the parameters that the inner loop changes, in the model's order.

    By default, these are all trainable parameters except those of per-step BatchNorm layers.
    """
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
    inner: InnerUpdate,
    x: Tree,
    y: Target,
    steps: int,
    first_order: bool,
    differentiable: bool = True,
    task: int = 0,
    how: MetaGradient = UNROLLED,
    per_step: bool = False,
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """The inner loop of one task: phi_{k+1} = phi_k - alpha_k * dL(phi_k)/dphi_k, or what else the update says.

    Args:
        model, loss: the task's loss is loss(model(phi, x), y).
        theta: phi_0, name -> tensor, for all parameters. Do not give the model's own parameters: their hooks would be
            called with the inner gradients.
        inner: the update of the adapted parameters.
        x, y: the support set of the task, [samples, ...]. Where y is Weighted, the loss gives those of all samples.
        steps: K.
        first_order: the inner gradients are constants.
        differentiable: whether the result has a graph back to theta and to the tensors of the update.
        task: its number in the call, for the masks of dropout.
        how: what the steps before `how.first_differentiated` add to the parameters is constant; the proximal term of an
            implicit gradient is a part of each step's loss.
        per_step: each step has its own set: x and y are [steps, samples, ...].

    Returns:
        phi_0 .. phi_K, and the support losses at phi_0 .. phi_{K-1} (detached).

    Raises:
        ValueError: the support loss does not depend on an adapted parameter.
    """
    phi: dict[str, Tensor] = dict(theta)
    losses = []
    with torch.enable_grad():
        if not differentiable:
            phi = {name: p.detach().requires_grad_(name in inner.updates) for name, p in phi.items()}
            inner = inner.mapped(Tensor.detach)
        second_order = differentiable and not first_order
        path, state = [phi], inner.start(phi)
        first = how.first_differentiated(steps)
        for step in range(steps):
            x_now, y_now = without_padding(*(pytrees.of_task((x, y), step) if per_step else (x, y)))
            twice = second_order and step >= first
            with ExitStack() as stack:
                stack.enter_context(at_step(model.module, step))
                stack.enter_context(model.of_pass(task, 2 * step))
                if twice:
                    stack.enter_context(model.differentiable_twice())
                value = value_of(loss, model(phi, x_now), y_now)
            adapted = [phi[name] for name in inner.updates]
            found = torch.autograd.grad(
                value, adapted, create_graph=twice, retain_graph=twice or None, allow_unused=True
            )
            losses.append(value.detach())
            grads = {}
            for name, g in zip(inner.updates, found, strict=True):
                if g is None:
                    raise unreached([name])
                if how.proximal is not None:
                    g = g + how.proximal * (phi[name] - path[0][name])
                grads[name] = g if twice else g.detach()
            with torch.set_grad_enabled(differentiable and step >= first):
                new, state = inner.step(phi, grads, state, step)
            if not differentiable:
                phi = {name: p.requires_grad_(name in inner.updates) for name, p in new.items()}
            elif step < first:  # what it adds to the parameters is constant
                phi = {name: p.detach() + (phi[name] - phi[name].detach()) for name, p in new.items()}
            else:
                phi = new
            path.append(phi)
    return path, losses


def sets_of_task(tree: Tree, task: int, sets: int) -> Tree:
    """The set of a task, or its sets [sets, samples, ...], where those of all tasks follow each other."""
    if sets == 1:
        return pytrees.of_task(tree, task)
    return pytrees.mapped(lambda t: t[task * sets : (task + 1) * sets], tree)


def unreached(names: list[str]) -> ValueError:
    """The error for adapted parameters that the support loss does not depend on."""
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
    spt_weights: Tensor | None = None,
    qry_weights: Tensor | None = None,
    meta_gradient: str = "unrolled",
    truncate: int | None = None,
    proximal: float | None = None,
    inner_optimizer: Optimizer | Groups | None = None,
    inner_clip_norm: float | None = None,
    inner_clip_value: float | None = None,
    inner_transform: GradientTransform | None = None,
    per_step_support: bool = False,
    support_batch: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The meta-loss and its exact gradient, by plain autograd (Finn, Abbeel, Levine 2017, equation 1).

    For each task, with rate alpha_k of inner step k and K = `inner_steps`:

        phi_0     = theta
        phi_{k+1} = phi_k - alpha_k * dL_spt(phi_k)/dphi_k

    The meta-loss is the mean of L_qry(phi_K) over tasks. Its gradient is taken in theta, through all inner steps.
    Dropout has the masks that FusedMAML has at the same state of torch's default generator.

    Args:
        model: any module. Its parameters and their `.grad` are not changed.
        loss: a name that FusedMAML accepts, or a function (prediction, target) -> scalar.
        x_spt, y_spt: support sets, `[tasks, n_support, ...]`. A model or a loss of your own may take pytrees of tensors
            `[tasks, ...]`; a policy-gradient loss takes a PolicyTarget.
        x_qry, y_qry: query sets, `[tasks, n_query, ...]`, in the same forms.
        inner_lr: alpha, in any form that FusedMAML accepts.
        inner_steps: K, from 0.
        first_order: treat the inner gradients as constants (FOMAML).
        adapt_params: which parameters the inner loop changes: a function of the name, or names; None: all trainable
            ones except those of per-step BatchNorm layers.
        query_weights: w, `[inner_steps + 1]`. The loss of a task is then the sum over k of w_k L_qry(phi_k) (the
            multi-step loss of MAML++, Antoniou, Edwards, Storkey 2019). None: L_qry(phi_K).
        spt_weights, qry_weights: weights of the samples, `[tasks, n]`, at least 0: L is the weighted mean over samples,
            and the model runs on those of positive weight alone. With either, a loss of your own returns `[samples]`.
        meta_gradient, truncate, proximal: what is computed in place of the exact gradient, as FusedMAML says. The
            linear system of "implicit" is solved exactly, by the whole Hessian.
        inner_optimizer, inner_clip_norm, inner_clip_value, inner_transform: as of FusedMAML. Each step is then what
            `updates.InnerUpdate.step` does with the gradient.
        per_step_support: L_spt of inner step k is that of a set of its own: x_spt and y_spt are `[inner_steps, tasks,
            n_support, ...]`.
        support_batch: L_spt of each inner step is that of so many samples, the ones that FusedMAML draws at the same
            state of torch's default generator.

    Returns:
        The meta-loss (0-d, detached), and a dict name -> gradient, of the shape of the parameter. It has every
            trainable parameter that the meta-loss depends on. A learned rate has the name `inner_lr` or
            `inner_lr.<name>`; a parameter of a loss module has the name `loss.<name>`; weights of samples that require
            grad have the name of the argument.

    Raises:
        ValueError: the support loss does not depend on an adapted parameter; a rate has no possible shape, or is not
            finite; the loss does not return a 0-d tensor.
        TypeError: a rate or the loss has a wrong type.
    """
    adapted = adapted_names(model, adapt_params)
    parameters = dict(model.named_parameters())
    shapes = {name: parameters[name].shape for name in adapted}
    inner = read(inner_lr, shapes, inner_steps, inner_optimizer, inner_clip_norm, inner_clip_value, inner_transform)
    wanted: dict[str, Tensor] = dict(parameters)
    if isinstance(inner_lr, Tensor):
        wanted["inner_lr"] = inner_lr
    elif isinstance(inner_lr, (Mapping, InnerRates)):
        wanted.update({f"inner_lr.{name}": r for name, r in inner_lr.items() if isinstance(r, Tensor)})
    for owner, module in (("loss", loss), ("inner_optimizer", inner_optimizer), ("inner_transform", inner_transform)):
        if isinstance(module, nn.Module):
            wanted.update({f"{owner}.{name}": p for name, p in module.named_parameters()})
    tasks, sets = pytrees.tasks(x_qry), max(inner_steps, 1) if per_step_support or support_batch else 1
    weighted = spt_weights is not None or qry_weights is not None
    if weighted:
        like = next(p for p in parameters.values())
        spt_weights, qry_weights = (
            like.new_ones(pytrees.tensors(x)[0].shape[:axes]) if w is None else w
            for x, w, axes in ((x_spt, spt_weights, 3 if per_step_support else 2), (x_qry, qry_weights, 2))
        )
        wanted.update(spt_weights=spt_weights, qry_weights=qry_weights)
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    y_spt = with_weights(y_spt, spt_weights)
    if per_step_support:
        x_spt, y_spt = pytrees.mapped(lambda t: t.transpose(0, 1).flatten(0, 1), (x_spt, y_spt))
    seed = Seed()
    if support_batch:
        n = pytrees.tensors(x_spt)[0].shape[1]
        chosen = minibatches.minibatches(seed(), tasks, n, support_batch, sets)
        x_spt, y_spt = minibatches.drawn((x_spt, y_spt), chosen)
    total, _, _, _, reached = meta_step(
        Functional(model, seed), objective(loss, weighted), inner, list(wanted.values()), x_spt,
        y_spt, x_qry, with_weights(y_qry, qry_weights),
        inner_steps, first_order, [1 / tasks] * tasks,
        None if query_weights is None else [float(w) for w in query_weights],
        meta_gradients.read(meta_gradient, truncate, proximal, inner_steps), sets,
    )  # fmt: skip
    gradients = {id(t): g for t, g in reached}
    return total, {name: gradients[id(t)] for name, t in wanted.items() if id(t) in gradients}


def meta_step(
    model: Functional,
    loss: Callable[..., Tensor],
    inner: InnerUpdate,
    wanted: list[Tensor],
    x_spt: Tree,
    y_spt: Target,
    x_qry: Tree,
    y_qry: Target,
    steps: int,
    first_order: bool,
    weights: Iterable[float | Tensor],
    query_weights: Sequence[float] | None = None,
    how: MetaGradient = UNROLLED,
    sets: int = 1,
) -> tuple[Tensor, Tensor, Tree | None, Tensor, list[tuple[Tensor, Tensor]]]:
    """One meta-step: the loss sum_t weights[t] * L_qry(phi_K) of task t, and its gradients.

    The graph of one task is freed before the next task begins, so memory does not grow with the number of tasks.

    Leaf copies of the tensors in `wanted` take part in the computation, so that hooks of the originals are not called
    with gradients of inner steps or single tasks. A loss or a forward of the user's own may read an original directly.
    The gradient in the original is then added to that in its copy. Other leaf tensors that require grad and that a loss
    reads are parameters of the loss: they have a gradient too.

    Args:
        model, loss: the loss of a set is loss(model(phi, x), y).
        inner: the update of the adapted parameters.
        wanted: the tensors whose gradients are computed: parameters, tensors of the update, or tensors of the data.
        x_spt, y_spt, x_qry, y_qry: [tasks, samples, ...], or pytrees of tensors [tasks, ...]. Where y is Weighted, the
            loss gives those of all samples, and predictions are zeros for padding.
        steps: K.
        first_order: the inner gradients are constants.
        weights: of the tasks.
        query_weights: w, [steps + 1]: the query loss of a task is sum_k w_k L_qry(phi_k). None: L_qry(phi_K).
        how: what is computed in place of the exact gradient.
        sets: support sets of a task, which follow each other: one for all steps, or one for each.

    Returns:
        loss (0-d), task_losses [tasks], predictions (from pytrees.stacked; None if it raises), support_losses
        [tasks, steps], of an implicit gradient with the residuals as a further column, all detached; and (tensor,
        gradient) of each tensor in `wanted`, and of each parameter of the loss, that the loss depends on.
    """
    total: float | Tensor = 0.0
    task_losses, predictions, support_losses = [], [], []
    wanted = list({id(t): t for t in wanted}.values())  # a rate of several parameters once
    # The gradient of a learned rate that no step uses (steps = 0) is zero, not None.
    of_inner = set(map(id, inner.tensors()))
    gradients: dict[int, Tensor] = {id(t): torch.zeros_like(t) for t in wanted if id(t) in of_inner}
    dtype = precision(p for _, p in model.module.named_parameters())
    in_dtype = {id(t) for update in inner.updates.values() for t in update.tensors() if not t.is_complex()}
    copies = {id(t): t.detach().to(dtype if id(t) in in_dtype else t.dtype).requires_grad_() for t in wanted}

    def copied(t: Tensor) -> Tensor:
        return copies.get(id(t), t)

    leaves = [*map(copied, wanted), *wanted]
    of_leaves = [*wanted, *wanted]  # the tensors whose gradients those in the leaves are
    theta = {name: copied(p) for name, p in model.module.named_parameters()}
    inner = inner.mapped(copied)
    x_spt, y_spt, x_qry, y_qry = (pytrees.mapped(copied, part) for part in (x_spt, y_spt, x_qry, y_qry))
    if isinstance(loss, Functional):
        loss = partial(loss, {name: copied(p) for name, p in loss.module.named_parameters()})
    differentiable = bool(wanted) and how.kind not in ("implicit", "reptile")
    for t, weight in enumerate(weights):
        x, target = sets_of_task(x_spt, t, sets), sets_of_task(y_spt, t, sets)
        path, losses = inner_loop(
            model, loss, theta, inner, x, target, steps, first_order, differentiable, t, how, sets > 1
        )  # fmt: skip
        if how.kind == "implicit":
            path[-1] = {**theta, **{name: path[-1][name].detach().requires_grad_() for name in inner.updates}}
            implied = partial(_implied, model, loss, theta, path[-1], list(inner.updates), x, target, steps, t, how)
        x, target = without_padding(pytrees.of_task(x_qry, t), pytrees.of_task(y_qry, t))
        with torch.set_grad_enabled(bool(wanted) and how.kind != "reptile"):
            prediction = query_prediction(model, path, steps, x, t)
            if query_weights is None:
                value = value_of(loss, prediction, target)
            else:
                value = sum(  # type: ignore[assignment]
                    w * value_of(loss, prediction if k == steps else query_prediction(model, path, k, x, t), target)
                    for k, w in enumerate(query_weights)
                    if w
                )
        if wanted and how.kind == "reptile":
            for name, p in model.module.named_parameters():
                if name in inner.updates:
                    share = weight * (p.detach() - path[-1][name].detach())
                    gradients[id(p)] = gradients[id(p)] + share if id(p) in gradients else share
        elif wanted:
            known = set(map(id, [*leaves, *path[-1].values()]))
            given = [*pytrees.tensors(prediction), *path[-1].values()]
            parameters = [leaf for leaf in leaves_between(given, value) if id(leaf) not in known]
            leaves, of_leaves = [*leaves, *parameters], [*of_leaves, *parameters]
            # A graph that the loss holds, from its parameters to a tensor outside, is needed by the next task.
            retain_graph = len(leaves) > 2 * len(wanted) or None
            scalar = value
            if how.kind == "implicit":
                scalar, residual = implied(value)
                losses.append(residual.to(losses[0].dtype if losses else value.dtype))
            grads = torch.autograd.grad(scalar, leaves, retain_graph=retain_graph, allow_unused=True)
            for of, g in zip(of_leaves, grads, strict=True):
                if g is not None:
                    share = weight * g
                    gradients[id(of)] = gradients[id(of)] + share if id(of) in gradients else share
        task_losses.append(value.detach())
        if isinstance(y_qry, Weighted):
            weights_of_task = y_qry.weights[t]
            prediction = _or_none(lambda _, p: with_padding(p, weights_of_task), prediction)  # noqa: B023
        predictions.append(_or_none(pytrees.detached, prediction))
        support_losses.append(torch.stack(losses) if losses else value.detach().new_zeros(0))
        total = total + (weight.detach() if isinstance(weight, Tensor) else weight) * value.detach()
    assert isinstance(total, Tensor)  # engine/data_checks.py refuses a call without tasks
    reached = {id(t): t for t in of_leaves if id(t) in gradients}
    outputs = _or_none(pytrees.stacked, predictions)
    return (
        total, torch.stack(task_losses), outputs, torch.stack(support_losses),
        [(t, gradients[id(t)].to(t.dtype)) for t in reached.values()],
    )  # fmt: skip


def _or_none(operation: Callable[[str, Tree], Tree], predictions: Tree) -> Tree | None:
    """The operation's result, or None for predictions that are no pytrees of tensors or that differ in structure.

    A loss of the user's own may accept such predictions.
    """
    try:
        return operation("the model's output", predictions)
    except (TypeError, ValueError):
        return None


def _implied(
    model: Functional, loss: Callable[..., Tensor], theta: Mapping[str, Tensor], phi: Mapping[str, Tensor],
    adapted: list[str], x: Tree, y: Target, steps: int, task: int, how: MetaGradient, value: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A scalar whose gradient is the implicit meta-gradient of one task with the query loss `value`, at phi = phi_K;
    and the relative residual of its linear system."""
    x, y = without_padding(x, y)
    twice, masks = model.differentiable_twice(), model.of_pass(task, 2 * steps)
    with torch.enable_grad(), at_step(model.module, steps), masks, twice:
        support = value_of(loss, model(phi, x), y)
        return implicit.surrogate(value, support, {name: phi[name] for name in adapted}, theta, how)


def query_prediction(model: Functional, path: list[dict[str, Tensor]], k: int, x: Tree, task: int) -> Tree:
    """The prediction at phi_k, where `path` is phi_0 .. phi_K. Per-step layers read the slot of step k - 1."""
    with at_step(model.module, max(k - 1, 0)), model.of_pass(task, 2 * k + 1):
        return model(path[k], x)

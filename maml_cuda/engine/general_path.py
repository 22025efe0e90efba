"""The meta-step and the differentiable inner loop of the general path: for any model, one task at a time, by autograd.

inner_steps.py has the algorithm. reference.py computes the same by one graph of the whole inner loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import pytrees, reference
from maml_cuda.engine.inner_steps import GRAPHS, Loop, Task
from maml_cuda.engine.sums import Leaf, Sums
from maml_cuda.engine.update_adjoint import Tensors, UpdateAdjoint
from maml_cuda.functional import Functional, precision
from maml_cuda.meta_gradients import MetaGradient
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import Weighted, with_padding
from maml_cuda.targets import Target
from maml_cuda.updates import InnerUpdate

Loss = Callable[..., Tensor]
Part = Callable[[Tensor], Tensor]


def support_of(sets: tuple[Tree, Target], per_step: bool) -> Callable[[int], tuple[Tree, Target]]:
    """The support set of each step: all have the same, or each has its own along the first axis."""

    def support(k: int) -> tuple[Tree, Target]:
        return pytrees.of_task(sets, k) if per_step else sets

    return support


def of_task(task: int) -> Part:
    """The part of one task of a tensor of all tasks."""
    return lambda t: t[task]


def sets_of_task(task: int, sets: int) -> Part:
    """The same of support sets; where a task has several they follow each other."""
    return of_task(task) if sets == 1 else lambda t: t[task * sets : (task + 1) * sets]


class Copies:
    """Leaf copies of tensors whose gradients are wanted, to compute with: hooks of the tensors are not called.

    Code of the user's own may read a tensor itself. The gradient in it is then added to that in its copy.
    """

    def __init__(self, wanted: Iterable[Tensor], model: nn.Module, update: InnerUpdate) -> None:
        dtype = precision(model.parameters())
        cast = {id(t) for u in update.updates.values() for t in u.tensors() if not t.is_complex()}
        self._leaves = {
            id(t): Leaf(t.detach().to(dtype if id(t) in cast else t.dtype).requires_grad_(), t) for t in wanted
        }

    def of(self, t: Tensor) -> Tensor:
        """The copy; of a tensor without one, the tensor without a graph."""
        return self._leaves[id(t)].tensor if id(t) in self._leaves else t.detach()

    def leaves(self, tensors: Iterable[Tensor]) -> list[Leaf]:
        """Those of these tensors, each once."""
        return list({id(t): self._leaves[id(t)] for t in tensors if id(t) in self._leaves}.values())

    def part(self, tree: Tree, part: Part) -> tuple[Tree, list[Leaf]]:
        """A part of each tensor of a tree, as a leaf if the gradient of the tensor is wanted, and these leaves."""
        leaves: list[Leaf] = []

        def of(t: Tensor) -> Tensor:
            if id(t) not in self._leaves:
                return part(t.detach())
            leaves.append(Leaf(part(t.detach()).requires_grad_(), t, part))
            return leaves[-1].tensor

        return pytrees.mapped(of, tree), leaves


def meta_step(
    model: Functional,
    loss: Loss,
    update: InnerUpdate,
    wanted: list[Tensor],
    x_spt: Tree,
    y_spt: Target,
    x_qry: Tree,
    y_qry: Target,
    steps: int,
    first_order: bool,
    weights: Iterable[float | Tensor],
    query_weights: Sequence[float] | None,
    how: MetaGradient,
    sets: int,
    recompute: bool,
    segments: bool,
) -> tuple[Tensor, Tensor, Tree | None, Tensor, list[tuple[Tensor, Tensor]]]:
    """One meta-step: the loss sum_t weights[t] * L_qry(phi_K) of task t, and its gradients.

    Args:
        model, loss: the loss of a set is loss(model(phi, x), y).
        update: of the adapted parameters.
        wanted: the tensors whose gradients are computed: parameters, those of the update, or tensors of the data.
        x_spt, y_spt, x_qry, y_qry: [tasks, samples, ...], or pytrees of tensors [tasks, ...]. Where y is Weighted, the
            loss gives those of all samples, and predictions are zeros for padding.
        steps: K.
        first_order: the inner gradients are constants.
        weights: of the tasks.
        query_weights: w, [steps + 1]: the query loss of a task is sum_k w_k L_qry(phi_k). None: L_qry(phi_K).
        how: what is computed in place of the exact gradient.
        sets: support sets of a task, which follow each other: one for all steps, or one for each.
        recompute: no graph of an inner step is kept.
        segments: nor are the parameters, but for about 2 sqrt(K) steps.

    Returns:
        loss (0-d), task_losses [tasks], predictions (from pytrees.stacked; None if it raises), support_losses
        [tasks, steps], all detached; and (tensor, gradient) of each tensor in `wanted`, and of each other leaf tensor
        that model or loss read from outside, on which the loss depends.
    """
    if how.kind == "implicit":  # which has no graph of the inner loop
        return reference.meta_step(
            model, loss, update, wanted, x_spt, y_spt, x_qry, y_qry, steps, first_order, weights, query_weights, how,
            sets,
        )  # fmt: skip
    parameters, of_update = dict(model.module.named_parameters()), update.tensors()
    copies = Copies(wanted, model.module, update)
    of_loss = list(loss.module.parameters()) if isinstance(loss, Functional) else []
    if isinstance(loss, Functional):
        loss = partial(loss, {name: copies.of(p) for name, p in loss.module.named_parameters()})
    leaves = copies.leaves([*(p for name, p in parameters.items() if name not in update.updates), *of_loss])
    # The gradient of a learned rate that no step uses (steps = 0) is zero, not None.
    sums, given = Sums(copies.leaves(of_update)), {name: Leaf.of_itself(p) for name, p in parameters.items()}
    differentiated = bool(wanted) and how.kind != "reptile"
    loop = Loop(
        model, loss, {name: copies.of(p) for name, p in parameters.items()}, copies.leaves(parameters.values()),
        UpdateAdjoint(update.mapped(copies.of), copies.leaves(of_update)),
        steps, differentiated, first_order, how.first_differentiated(steps), 0 if recompute else GRAPHS,
        segments,
    )  # fmt: skip
    total: float | Tensor = 0.0
    task_losses, predictions, support_losses = [], [], []
    for t, weight in enumerate(weights):
        weight = sums.weight = weight.detach() if isinstance(weight, Tensor) else weight
        support, of_support = copies.part((x_spt, y_spt), sets_of_task(t, sets))
        query, of_query = copies.part((x_qry, y_qry), of_task(t))
        task = Task(loop, t, support_of(support, sets > 1), [*leaves, *of_support])
        shares = {steps: 1.0} if query_weights is None else dict(enumerate(query_weights))
        value, prediction, of_query_losses = _query(task, query, shares, [*leaves, *of_query], sums)
        if differentiated:
            v = task.adjoint(of_query_losses.pop(steps, {}), of_query_losses, sums)
        elif wanted:  # Reptile
            v = {name: p - task.phi(steps)[name] for name, p in task.phi(0).items()}
        for name, c in v.items() if wanted else ():
            sums.add(given[name], c)
        task_losses.append(value)
        if isinstance(y_qry, Weighted):
            prediction = _or_none(_padded(y_qry.weights[t]), prediction)
        predictions.append(_or_none(pytrees.detached, prediction))
        support_losses.append(torch.stack(task.losses) if task.losses else value.new_zeros(0))
        total = total + weight * value
    assert isinstance(total, Tensor)  # data_checks.py refuses a call without tasks
    outputs = _or_none(pytrees.stacked, predictions)
    return total, torch.stack(task_losses), outputs, torch.stack(support_losses), sums.gradients()


def _query(
    task: Task, query: tuple[Tree, Target], shares: Mapping[int, float],
    leaves: Sequence[Leaf], sums: Sums,
) -> tuple[Tensor, Tree, dict[int, Tensors]]:  # fmt: skip
    """The query loss of a task, the sum of share k times that at phi_k; the prediction after the last step; and, of
    the loss, the gradient in phi_k for each k. Those in other tensors are added to `sums`.

    One graph exists at a time.
    """
    last = max(shares)
    values, cotangents = {}, {}
    for k in (last, *(k for k, share in shares.items() if share and k != last)):
        graph = task.query(k, *query)
        values[k] = graph.value.detach()
        if k == last:
            prediction = graph.prediction
        if graph.value.requires_grad and shares[k]:
            share = torch.full_like(values[k], shares[k])
            cotangents[k] = graph.pulled([(graph.value, share)], leaves, sums)
    if task.differentiated and not cotangents:
        graph.value.backward()  # raises torch's own error for a value without a graph
    value = sum(share * values[k] for k, share in sorted(shares.items()) if share)
    assert isinstance(value, Tensor)
    return value, prediction, cotangents


def _padded(weights: Tensor) -> Callable[[str, Tree], Tree]:
    return lambda _, prediction: with_padding(prediction, weights)


def _or_none(operation: Callable[[str, Tree], Tree], predictions: Tree) -> Tree | None:
    """The operation's result, or None for predictions that are no pytrees of tensors or that differ in structure.

    A loss of the user's own may accept such predictions.
    """
    try:
        return operation("the model's output", predictions)
    except (TypeError, ValueError):
        return None


def adapt(
    model: Functional,
    loss: Loss,
    update: InnerUpdate,
    x: Tree,
    y: Target,
    steps: int,
    first_order: bool,
    differentiable: bool,
    how: MetaGradient,
    sets: int,
    recompute: bool,
    segments: bool,
) -> dict[str, Tensor]:
    """The parameters after the inner loop, name -> [tasks, *shape].

    Args:
        differentiable: whether they have a graph, of one node: to the model's parameters, to those of the update and of
            the loss, to data that require grad, and to leaf tensors that model or loss read from outside.
        how, sets, recompute, segments: as of meta_step.
    """
    given = dict(model.module.named_parameters())
    if how.kind == "implicit":
        paths = []
        for t in range(pytrees.tasks(x) // sets):
            of_x, of_y = pytrees.mapped(sets_of_task(t, sets), (x, y))
            theta = {name: p.view_as(p) for name, p in given.items()}  # hooks see the outer gradient alone
            paths.append(
                reference.inner_loop(
                    model, loss, theta, update, of_x, of_y, steps, first_order, differentiable, t, how, sets > 1
                )[0]
            )
        adapted = {name: torch.stack([path[-1][name] for path in paths]) for name in update.updates}
        return adapted if differentiable else {name: p.detach() for name, p in adapted.items()}
    inputs = [t for t in (*given.values(), *update.tensors(), *pytrees.tensors((x, y))) if t.requires_grad]
    inputs = list({id(t): t for t in inputs}.values()) if differentiable else []
    record = _Adaptation(model, loss, update, x, y, steps, first_order, how, sets, recompute, segments, inputs)
    adapted = {name: torch.stack([task.phi(steps)[name] for task in record.tasks]) for name in update.updates}
    if not differentiable:
        return adapted
    outside = {id(t): t for task in record.tasks for t in task.outside.values()}
    inputs += [t for i, t in outside.items() if i not in set(map(id, inputs))]
    record.inputs = inputs
    outputs = _Adapted.apply(record, adapted, *inputs)  # type: ignore[no-untyped-call]
    return dict(zip(adapted, outputs, strict=True))


class _Adaptation:
    """The inner loops of all tasks of a call of `adapt`, and the tensors on which their results depend."""

    inputs: list[Tensor]

    def __init__(
        self, model: Functional, loss: Loss, update: InnerUpdate, x: Tree, y: Target, steps: int, first_order: bool,
        how: MetaGradient, sets: int, recompute: bool, segments: bool, wanted: list[Tensor],
    ) -> None:  # fmt: skip
        self.model, self.loss, self.update, self.x, self.y = model, loss, update, x, y
        self.steps, self.first_order, self.how, self.sets = steps, first_order, how, sets
        self.parameters, of_update = dict(model.module.named_parameters()), update.tensors()
        copies = Copies(wanted, model.module, update)
        fixed = copies.leaves(p for name, p in self.parameters.items() if name not in update.updates)
        tasks = pytrees.tasks(x) // sets
        loop = Loop(
            model, loss, {name: copies.of(p) for name, p in self.parameters.items()},
            copies.leaves(self.parameters.values()),
            UpdateAdjoint(update.mapped(copies.of), copies.leaves(of_update)),
            steps, bool(wanted), first_order, how.first_differentiated(steps), 0 if recompute else GRAPHS // tasks,
            segments,
        )  # fmt: skip
        self.tasks = []
        for t in range(tasks):
            support, of_support = copies.part((x, y), sets_of_task(t, sets))
            self.tasks.append(Task(loop, t, support_of(support, sets > 1), [*fixed, *of_support], bool(wanted)))

    def adjoint(self, v: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(tensor, gradient) from the cotangents of the adapted parameters, [tasks, *shape]."""
        sums = Sums()
        for t, task in enumerate(self.tasks):
            for name, c in task.adjoint({name: of_all[t] for name, of_all in v.items()}, {}, sums).items():
                sums.add(Leaf.of_itself(self.parameters[name]), c)
        return sums.gradients()

    def graph(self) -> dict[str, Tensor]:
        """The adapted parameters with a graph of the whole inner loop, for a derivative of the adjoint."""
        theta = {name: p.view_as(p) for name, p in self.parameters.items()}
        paths = []
        for t in range(len(self.tasks)):
            x, y = pytrees.mapped(sets_of_task(t, self.sets), (self.x, self.y))
            path, _ = reference.inner_loop(
                self.model, self.loss, theta, self.update, x, y, self.steps, self.first_order, True, t, self.how,
                self.sets > 1,
            )  # fmt: skip
            paths.append(path)
        return {name: torch.stack([path[-1][name] for path in paths]) for name in self.update.updates}


class _Adapted(torch.autograd.Function):
    """The adapted parameters, as a function of the tensors on which they depend."""

    @staticmethod
    def forward(ctx: Any, record: _Adaptation, adapted: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.record, ctx.names = record, list(adapted)
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(adapted.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs, record = ctx.saved_tensors, ctx.record  # raises if one has changed in place
        v = {name: c for name, c in zip(ctx.names, cotangents, strict=True) if c is not None}
        if torch.is_grad_enabled():
            adapted = record.graph()
            grads = torch.autograd.grad(
                [adapted[name] for name in v], inputs, list(v.values()), create_graph=True, allow_unused=True
            )
            return None, None, *grads
        gradients = {id(t): g for t, g in record.adjoint(v)}
        return None, None, *(gradients.get(id(t)) for t in record.inputs)

"""The gradients of data and of support weights, from what the core hands out of each inner step and query loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from maml_cuda.engine.problem import Problem
from maml_cuda.plan.data_proof import NAMES


def split(
    problem: Problem, raw: Tensor, inputs: list[Any], task_weights: Tensor | None, query_weights: Tensor | None,
    query_steps: Sequence[int], mean: bool = True,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(tensor, gradient of the loss) of those of the data of an op that have one.

    Args:
        raw: [tasks, size], as the core hands it out.
        inputs: x_spt, [y_spt, ...], x_qry, [y_qry, ...], as the op takes them; or the first two.
        query_weights, query_steps: as the op takes them.
        mean: over the tasks, where there are no task_weights; otherwise the sum.
    """
    places, found = problem.core.data_places, []
    for name, given, begin, end in zip(NAMES, inputs, places, places[1:], strict=False):
        if begin == end:
            continue
        like: Tensor = given if isinstance(given, Tensor) else given[0]
        sets = problem.sets if name.endswith("spt") else 1
        copies = raw[:, begin:end].reshape(len(raw), -1, like.numel() // len(raw) // sets)  # [tasks, copies, ...]
        if name.endswith("qry"):
            scales: list[Any] = [1.0] if query_weights is None else [query_weights[k] for k in query_steps]
        else:
            scales = [-1.0] * copies.shape[1]
        if name[0] == "y" and problem.loss == "mse":
            scales = [-s for s in scales]
        if sets == 1:  # in this order, whatever the number of tasks
            total = _in_order([scale * copies[:, k] for k, scale in enumerate(scales)])
        else:
            total = scales[0] * copies
        by_task = (
            (1 / len(raw) if mean else 1)
            if task_weights is None
            else task_weights.reshape(-1, *[1] * (total.dim() - 1))
        )
        found.append((like, (by_task * total).reshape(like.shape)))
    return found


def slopes(problem: Problem, raw: Tensor, samples: int) -> Tensor:
    """Of the support samples [tasks * sets, samples]: the sums over inner steps of <g_i, z_dot_i> (autograd.py).

    raw: [tasks, size], as the core hands it out.
    """
    *_, begin, end = problem.core.data_places
    g, z_dot = raw[:, begin:end].reshape(len(raw), -1, 2, samples, problem.features).unbind(2)
    of_steps = (g * z_dot).sum(-1)
    if problem.sets > 1:
        return of_steps.reshape(-1, samples)
    return _in_order(list(of_steps.unbind(1)))


def _in_order(terms: list[Tensor]) -> Tensor:
    """Their sum, in this order whatever the number of tasks."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total

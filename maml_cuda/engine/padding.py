"""Samples with weights in the ops (ops.py): where a target is the list of the target and the weights [tasks, n], whose
padding, of weight 0, stands behind the other samples."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from maml_cuda.engine.problem import Problem
from maml_cuda.plan.schema import plan_of

TargetList = list[Tensor | None]


def is_weighted(y: TargetList) -> bool:
    return len(y) == 2


def of_problem(y: TargetList) -> tuple[tuple[int, ...], bool] | tuple[()]:
    """The last arguments of problem_of."""
    return ((), True) if is_weighted(y) else ()


def counts(y: TargetList) -> Tensor:
    """How many samples of each set are no padding, int64 [tasks]."""
    return (cast(Tensor, y[1]) > 0).sum(1)


def of_support(problem: Problem, y: TargetList) -> dict[str, Tensor]:
    """The arguments of a run for a support set: the core leaves out its padding on the CPU."""
    return {"support_counts": counts(y)} if is_weighted(y) and problem.backend == "cpu" else {}


def of_query(problem: Problem, counted: Tensor | None) -> dict[str, Tensor]:
    """The same for a query set, of which so many samples count; None: all."""
    return {} if counted is None or problem.backend != "cpu" else {"query_counts": counted.contiguous()}


def slopes(y: TargetList, plan: str) -> int:
    """The number of slopes of the support samples behind a flat gradient."""
    return cast(Tensor, y[1]).numel() if is_weighted(y) and plan_of(plan).backend == "cpu" else 0


def with_slopes(flat: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The flat gradient alone, and the arguments of a run for the slopes behind it."""
    if not count:
        return flat, {}
    gradient, behind = flat.split([len(flat) - count, count])
    return gradient, {"sample_slopes": behind}


def blank(prediction: Tensor, counted: Tensor) -> Tensor:
    """A prediction [tasks, n, ...] with zeros for all samples but the first `counted` of each task, in its memory."""
    places = torch.arange(prediction.shape[1], device=prediction.device)
    return prediction.masked_fill_((places >= counted.unsqueeze(1)).unsqueeze(-1), 0)

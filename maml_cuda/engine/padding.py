"""Samples with weights in the ops (ops.py): where a target is the list of the target and the weights [tasks, n], whose
padding, of weight 0, stands behind the other samples."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from maml_cuda.engine.problem import Problem

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


def set_of(problem: Problem, x: Tensor, counted: Tensor | None) -> list[Tensor | None]:
    """A query set without a target. On a GPU padding is told by a share of the loss that is 0."""
    if counted is None or problem.backend == "cpu":
        return [x, None, None, None]
    return [x, None, is_counted(x, counted).to(x.dtype), None]


def is_counted(x: Tensor, counted: Tensor) -> Tensor:
    """Whether each sample is among the first `counted` of its task, [tasks, n]."""
    return torch.arange(x.shape[1], device=x.device) < counted.unsqueeze(1)


def blank(prediction: Tensor, counted: Tensor) -> Tensor:
    """A prediction [tasks, n, ...] with zeros for all samples but the first `counted` of each task, in its memory."""
    return prediction.masked_fill_(is_counted(prediction, counted).logical_not().unsqueeze(-1), 0)

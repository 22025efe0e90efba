"""What follows from a plan and the signature of a call: the core's problem, its workspace, the shapes of its results.

Each is computed once for a signature. The ops are given a plan as JSON text (plan/schema.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from maml_cuda import _core, targets
from maml_cuda.engine import cpu_workspace, cuda_runner, data_checks
from maml_cuda.engine.bounded import Bounded
from maml_cuda.plan.schema import plan_of
from maml_cuda.targets import POLICY_LOSSES, PolicyTarget, Target

MOST_PROBLEMS = 128  # kept; a problem takes up to some hundred kilobytes


class Problem:
    """A problem of the core, for one plan, operation and set of shapes, with the memory that its calls take.

    Attributes:
        features: of the prediction [n, features], in torch's order of elements.
        loss_columns: of the support losses.
        sets: support sets of a task, which follow each other.
        target: of that or, for a Gaussian policy, of its mean alone; what a computed loss compares.
        weighted: whether samples have weights, which stand behind the target in its list.
    """

    __slots__ = (
        "at_once",
        "backend",
        "core",
        "features",
        "gradient_size",
        "graphs",
        "loss",
        "loss_columns",
        "runners",
        "sets",
        "target",
        "weighted",
        "workspaces",
    )

    def __init__(
        self, text: str, operation: str, sample: tuple[int, ...], n_support: int, n_query: int, steps: int,
        first_order: bool, double: bool, query_steps: tuple[int, ...] = (), weighted: bool = False,
    ):  # fmt: skip
        plan = plan_of(text)
        self.backend = plan.backend
        self.core = _core.Problem(
            plan, operation, list(sample), n_support, n_query, steps, first_order, double, list(query_steps),
            weighted,
        )  # fmt: skip
        self.weighted = weighted
        self.features = math.prod(self.core.prediction)
        self.loss_columns = self.core.loss_columns
        self.sets = self.core.support_sets
        self.loss = plan.loss
        computed = plan.target if self.loss == "computed" else None
        halves = 2 if self.loss == "gaussian_policy_gradient" else 1  # mean and log_std beside each other
        self.target = self.features // halves if computed is None else computed
        self.gradient_size = plan.gradient_size
        self.at_once = plan.task_chunk
        self.graphs = plan.cuda_graphs
        self.workspaces: Bounded[tuple[int, int], int] = Bounded(64)  # of the CPU: (tasks, threads) -> bytes
        self.runners: dict[torch.device, cuda_runner.Runner] = {}

    def run(self, like: Tensor, tasks: int, *tensors: Any, **more: Any) -> None:
        """`tensors`, `more`: the arguments of _core.Call from the parameters on."""
        if self.backend == "cuda":
            self.runner(like.device).run(like, tasks, self.at_once or tasks, self.graphs, *tensors, **more)
            return
        threads = torch.get_num_threads()
        size = self.workspaces.get((tasks, threads))
        if size is None:
            size = self.workspaces[tasks, threads] = self.core.workspace(tasks, threads) * like.element_size()
        memory = cpu_workspace.take(size)
        self.core.run(tasks, threads, memory, *tensors, **more)
        cpu_workspace.keep(memory)

    def runner(self, on: torch.device) -> cuda_runner.Runner:
        runner = self.runners.get(on)
        if runner is None:
            runner = self.runners[on] = cuda_runner.Runner(_core, self.core, on)
        return runner

    def workspace_bytes(self, like: Tensor, tasks: int) -> int:
        if self.backend == "cuda":
            elements = self.runner(like.device).workspace(tasks, self.at_once or tasks)
        else:
            elements = self.core.workspace(tasks, torch.get_num_threads())
        return elements * like.element_size()

    def support(self, name: str, x: Tensor, y: list[Tensor | None]) -> list[Tensor | None]:
        return self.data(name, x, y, self.sets)

    def data(self, name: str, x: Tensor, y: list[Tensor | None], sets: int = 1) -> list[Tensor | None]:
        """x and what its loss compares, dense: y, and of a policy what each sample counts and its old log-probability;
        of samples with weights their shares of the loss.

        sets: of a task, which follow each other.

        Raises:
            TypeError: a target of another dtype than that in which its memory is read.
            ValueError: a target that does not fit the prediction; weights that do not fit, or with padding before other
                samples.
        """
        data_checks.target_dtypes(name, self.loss, y, x.dtype)
        weights = None
        if self.weighted:
            y, weights = y[:1], cast(Tensor, y[1])
            data_checks.weights_in_order(f"the weights of {name}", weights, x, self.backend == "cpu")
        y = [None if t is None else t.resolve_neg() for t in y]  # in a list the dispatcher leaves negations as they are
        target: Target = PolicyTarget(*y) if self.loss in POLICY_LOSSES else y[0]  # type: ignore[arg-type]
        data_checks.target(name, self.loss, target, (x.shape[1], self.target))
        if isinstance(target, Tensor):
            return [x.contiguous(), target.contiguous(), None if weights is None else self._shares(weights), None]
        if self.backend == "cpu":
            by_task = PolicyTarget(*(None if t is None else t.unflatten(0, (-1, sets)) for t in target))  # type: ignore[arg-type]
            data_checks.target_values(name, by_task if sets > 1 else target, None)  # the core looks at the actions
        scale, old = targets.coefficients(target), target.old_log_probs
        return [*dense([x, target.actions, scale]), None if old is None else old.contiguous()]

    def _shares(self, weights: Tensor) -> Tensor:
        """Of the samples in the loss. Those on a GPU tell padding, which alone has 0."""
        shares = targets.shares(weights)
        if self.backend != "cpu":
            shares = torch.where(weights > 0, shares.clamp_min(torch.finfo(shares.dtype).tiny), 0)
        return shares.contiguous()


def is_double(x: Tensor) -> bool:
    """Whether an op computes in float64, the dtype of its input; otherwise in float32.

    Raises:
        TypeError: the core would read the memory of x as what it is not.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}")
    return x.dtype == torch.float64


# (plan, operation, sample, n_support, n_query, steps, first_order, double, query_steps, weighted)
problem_of = lru_cache(maxsize=MOST_PROBLEMS)(Problem)


def why_not(plan: str, sample: tuple[int, ...], n_support: int, n_query: int, dtype: torch.dtype) -> str:
    """The reason why no fused layer fits samples of this shape, or nothing.

    Raises:
        ValueError: they do not fit a layer of the model.
    """
    try:
        problem_of(plan, "meta_loss", tuple(sample), n_support, n_query, 0, True, dtype == torch.float64)
    except _core.Unsupported as reason:
        return str(reason)
    return ""


def meta_problem(
    plan: str, x_spt: Tensor, x_qry: Tensor, steps: int, first_order: bool, gradient: bool,
    query_steps: Sequence[int] = (), weighted: bool = False,
) -> Problem:  # fmt: skip
    """The problem of a meta-step, with or without the meta-gradient."""
    operation = "meta_gradient" if gradient else "meta_loss"
    sample, double = tuple(x_spt.shape[2:]), is_double(x_spt)
    return problem_of(
        plan, operation, sample, x_spt.shape[1], x_qry.shape[1], steps, first_order, double, tuple(query_steps),
        *([True] if weighted else []),
    )  # fmt: skip


def features(plan: str, x: Tensor) -> int:
    """The number of elements of the prediction of one sample of x [tasks, n, ...]."""
    sample, n = tuple(int(d) for d in x.shape[2:]), int(x.shape[1])
    return problem_of(plan, "predict", sample, 0, n, 0, False, is_double(x)).features


def adapted(plan: str, tensors: list[Tensor]) -> list[Tensor]:
    """Those of one tensor a parameter that belong to adapted ones."""
    return [t for t, p in zip(tensors, plan_of(plan).parameters, strict=True) if p.role == "adapted"]


def spread(plan: str, adapted: list[Tensor]) -> list[Tensor | None]:
    """One entry for each parameter: the tensor of an adapted one, None for another."""
    rest = iter(adapted)
    return [next(rest) if p.role == "adapted" else None for p in plan_of(plan).parameters]


def dense(tensors: list[Tensor]) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def joined(tensors: list[Tensor]) -> Tensor:
    """All tensors in one flat one; complex ones as their real and imaginary parts."""
    return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in tensors])


def cut(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """`flat` as tensors shaped as `like`."""
    parts = flat.split([math.prod(t.shape) * (2 if t.is_complex() else 1) for t in like])
    return [
        torch.complex(*part.view(*t.shape, 2).unbind(-1)) if t.is_complex() else part.view(t.shape)
        for part, t in zip(parts, like, strict=True)
    ]

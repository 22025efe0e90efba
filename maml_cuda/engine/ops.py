"""The fused calls as torch.library ops: schemas, implementations, fake kernels.

An op is a pure function of its tensors and of `plan`, the JSON text of a plan (plan/schema.py), so that a compiled or
exported program needs nothing else. The ops here have no backward; autograd.py has those that do.

    meta_gradient   loss, task losses, logits, support losses, the flat gradient of parameters and learned rates
    meta_gradient_of_data    the same, and what the gradients of data are made of
    adapt_forward, adapt_backward    the adapted parameters of every task, and the support losses
    fisher_vector_product    of the adapted policies, through the inner loop
    inner_step, predict_forward, predict_backward, loss_and_grad, hvp    at parameters that are each task's own

A target is a list: one tensor, or the four fields of a PolicyTarget. Where a plan has per_step_support, support data
are [tasks * steps, n, ...]: the sets of a task follow each other. Where samples have weights, a target is followed by
them, [tasks, n]: those of padding, 0, stand behind the others, and logits of padding are 0. `seed` is
that of the masks of dropout (maml_cuda/masks.py), for a plan that draws any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from maml_cuda.engine import padding
from maml_cuda.engine.fisher import FisherProducts
from maml_cuda.engine.padding import TargetList
from maml_cuda.engine.problem import (
    Problem,
    adapted,
    dense,
    features,
    is_double,
    meta_problem,
    problem_of,
    spread,
)
from maml_cuda.plan.schema import plan_of

LIBRARY = torch.library.Library("maml_cuda", "DEF")


def _by_task(tensors: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Per-task tensors [tasks, *shape], each task's part dense, and the strides from task to task (0: one for all)."""
    parts = []
    for t in tensors:
        shared = t.stride(0) == 0 and t[0].is_contiguous()
        parts.append(t if shared else t.contiguous())
    return parts, [0 if t.stride(0) == 0 else t[0].numel() for t in parts]


def _seeded(seed: Tensor | None) -> dict[str, int]:
    """The arguments of a run for random masks."""
    return {} if seed is None else {"seed": int(seed)}


# -- meta_gradient -------------------------------------------------------------------------------------------

LIBRARY.define(
    "meta_gradient(Tensor[] parameters, Tensor[] rates, Tensor x_spt, Tensor?[] y_spt, Tensor x_qry, Tensor?[] y_qry, "
    "Tensor? task_weights, str plan, int steps, bool first_order, bool gradient, Tensor? query_weights=None, "
    "int[] query_steps=[], Tensor? seed=None) "
    "-> (Tensor loss, Tensor task_losses, Tensor logits, Tensor support_losses, Tensor gradient)"
)


def _meta_gradient(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, plan: str, steps: int, first_order: bool, gradient: bool,
    query_weights: Tensor | None = None, query_steps: Sequence[int] = (), seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weighted = padding.is_weighted(y_spt)
    problem = meta_problem(plan, x_spt, x_qry, steps, first_order, gradient, query_steps, weighted)
    return _run_meta_step(
        problem, parameters, rates, x_spt, y_spt, x_qry, y_qry, task_weights, steps, gradient, query_weights, seed
    )  # fmt: skip


def _run_meta_step(
    problem: Problem, parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, steps: int, gradient: bool, query_weights: Tensor | None,
    seed: Tensor | None, data: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    support, query = problem.support("y_spt", x_spt, y_spt), problem.data("y_qry", x_qry, y_qry)
    counted = padding.counts(y_qry) if padding.is_weighted(y_spt) else None
    counts = {**padding.of_support(problem, y_spt), **padding.of_query(problem, counted)}
    outputs = meta_step(
        problem, parameters, rates, support, query, task_weights, query_weights, steps, gradient, seed, data, **counts
    )  # fmt: skip
    if counted is not None:
        padding.blank(outputs[2], counted)
    return outputs


def meta_step(
    problem: Problem, parameters: list[Tensor], rates: list[Tensor], support: list[Tensor | None],
    query: list[Tensor | None], task_weights: Tensor | None, query_weights: Tensor | None, steps: int, gradient: bool,
    seed: Tensor | None, data: Tensor | None = None, **counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op meta_gradient, on data that have been checked. data: zeros, for the gradients of data."""
    x_spt, x_qry = cast(Tensor, support[0]), cast(Tensor, query[0])
    parameters, rates = dense(parameters), dense(rates)
    tasks = x_qry.shape[0]
    gradient_size = problem.gradient_size if gradient else 0
    outputs = _meta_outputs(x_qry, tasks, problem.features, problem.loss_columns, gradient_size)
    loss, task_losses, logits, support_losses, flat = outputs
    if task_weights is not None:
        task_weights = task_weights.contiguous()
    problem.run(
        x_spt, tasks, parameters, rates, support, query, task_weights, query_weights,
        [loss, task_losses, support_losses], logits, flat if gradient else None, **_seeded(seed), **counts,
        **({} if data is None else {"data_gradient": data}),
    )  # fmt: skip
    return outputs


def _meta_outputs(
    like: Tensor, tasks: int, features: int, loss_columns: int, gradient: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        like.new_empty(()),
        like.new_empty(tasks),
        like.new_empty((tasks, like.shape[1], features)),
        like.new_empty((tasks, loss_columns)),
        like.new_empty(gradient),
    )


def _meta_gradient_fake(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, plan: str, steps: int, first_order: bool, gradient: bool,
    query_weights: Tensor | None = None, query_steps: Sequence[int] = (), seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradient_size = plan_of(plan).gradient_size if gradient else 0
    columns = _loss_columns(plan, steps, gradient)
    return _meta_outputs(x_qry, x_qry.shape[0], features(plan, x_qry), columns, gradient_size)


def _loss_columns(plan: str, steps: int, gradient: bool) -> int:
    """Of support_losses: the inner steps, and the relative residual of the linear system of an implicit gradient."""
    return steps + (gradient and plan_of(plan).meta_gradient.kind == "implicit")


LIBRARY.define(
    "meta_gradient_of_data(Tensor[] parameters, Tensor[] rates, Tensor x_spt, Tensor?[] y_spt, Tensor x_qry, "
    "Tensor?[] y_qry, Tensor? task_weights, str plan, int steps, bool first_order, Tensor? query_weights=None, "
    "int[] query_steps=[], Tensor? seed=None) "
    "-> (Tensor loss, Tensor task_losses, Tensor logits, Tensor support_losses, Tensor gradient, Tensor data)"
)


def _meta_gradient_of_data(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, plan: str, steps: int, first_order: bool,
    query_weights: Tensor | None = None, query_steps: Sequence[int] = (), seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op meta_gradient, with the gradients of data that data_gradients.py splits."""
    weighted = padding.is_weighted(y_spt)
    problem = meta_problem(plan, x_spt, x_qry, steps, first_order, True, query_steps, weighted)
    data = x_qry.new_zeros((len(x_qry), problem.core.data_places[-1]))
    outputs = _run_meta_step(
        problem, parameters, rates, x_spt, y_spt, x_qry, y_qry, task_weights, steps, True, query_weights, seed, data
    )  # fmt: skip
    return *outputs, data


def _meta_gradient_of_data_fake(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, plan: str, steps: int, first_order: bool,
    query_weights: Tensor | None = None, query_steps: Sequence[int] = (), seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradient_size = plan_of(plan).gradient_size
    columns = _loss_columns(plan, steps, True)
    outputs = _meta_outputs(x_qry, x_qry.shape[0], features(plan, x_qry), columns, gradient_size)
    sample, n = tuple(int(d) for d in x_spt.shape[2:]), (int(x_spt.shape[1]), int(x_qry.shape[1]))
    problem = problem_of(
        plan, "meta_gradient", sample, *n, steps, first_order, is_double(x_spt), tuple(query_steps)
    )  # fmt: skip
    size = problem.core.data_places[-1]
    return *outputs, x_qry.new_empty((x_qry.shape[0], size))


# -- adapt ---------------------------------------------------------------------------------------------------

LIBRARY.define(
    "adapt_forward(Tensor[] parameters, Tensor[] rates, Tensor x, Tensor?[] y, str plan, int steps, "
    "Tensor? seed=None) "
    "-> (Tensor[], Tensor)"
)
LIBRARY.define(
    "adapt_backward(Tensor[] parameters, Tensor[] rates, Tensor x, Tensor?[] y, Tensor[] cotangents, str plan, "
    "int steps, bool first_order, Tensor? seed=None) -> (Tensor gradient, Tensor data)"
)


def _adapt_forward(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, plan: str, steps: int,
    seed: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    _, n, *sample = x.shape
    problem = problem_of(plan, "adapt", tuple(sample), n, 0, steps, True, is_double(x), *padding.of_problem(y))
    tasks = x.shape[0] // problem.sets
    support = problem.support("y_spt", x, y)
    parameters, rates = dense(parameters), dense(rates)
    fast, support_losses = _adapt_fake(parameters, rates, x, y, plan, steps)
    problem.run(
        x, tasks, parameters, rates, support, losses=[None, None, support_losses], per_task=spread(plan, fast),
        **_seeded(seed), **padding.of_support(problem, y),
    )  # fmt: skip
    return fast, support_losses


def _adapt_fake(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, plan: str, steps: int,
    seed: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    sets = max(steps, 1) if plan_of(plan).per_step_support else 1
    tasks = x.shape[0] // sets
    fast = [p.new_empty((tasks, *p.shape)) for p in adapted(plan, parameters)]
    return fast, x.new_empty((tasks, steps))


def _adapt_backward(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, cotangents: list[Tensor], plan: str,
    steps: int, first_order: bool, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The flat gradient, and what the gradients of data are made of (data_gradients.py)."""
    _, n, *sample = x.shape
    problem = problem_of(
        plan, "adapt_backward", tuple(sample), n, 0, steps, first_order, is_double(x), *padding.of_problem(y)
    )  # fmt: skip
    tasks = x.shape[0] // problem.sets
    support = problem.support("y_spt", x, y)
    parameters, rates = dense(parameters), dense(rates)
    given, strides = _by_task(cotangents)
    flat = x.new_empty(plan_of(plan).gradient_size)
    data = x.new_zeros((tasks, problem.core.data_places[-1]))
    spread_given = spread(plan, given)
    rest = iter(strides)
    problem.run(
        x, tasks, parameters, rates, support, given=spread_given,
        given_strides=[0 if t is None else next(rest) for t in spread_given], gradient=flat,
        **_seeded(seed), **padding.of_support(problem, y), **({"data_gradient": data} if data.numel() else {}),
    )  # fmt: skip
    return flat, data


def _adapt_backward_fake(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, cotangents: list[Tensor], plan: str,
    steps: int, first_order: bool, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = 0
    if plan_of(plan).data_gradient:
        sample, n = tuple(int(d) for d in x.shape[2:]), int(x.shape[1])
        problem = problem_of(
            plan, "adapt_backward", sample, n, 0, steps, first_order, is_double(x), *padding.of_problem(y)
        )  # fmt: skip
        size = problem.core.data_places[-1]
    sets = max(steps, 1) if plan_of(plan).per_step_support else 1
    return x.new_empty(plan_of(plan).gradient_size), x.new_empty((x.shape[0] // sets, size))


# -- fisher_vector_product -----------------------------------------------------------------------------------

LIBRARY.define(
    "fisher_vector_product(Tensor[] parameters, Tensor[] rates, Tensor x_spt, Tensor?[] y_spt, Tensor x_qry, "
    "Tensor? weights, Tensor[] v, str plan, int steps, bool first_order, "
    "Tensor? seed=None) -> Tensor[]"
)


def _fisher_vector_product(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    weights: Tensor | None, v: list[Tensor], plan: str, steps: int, first_order: bool,
    seed: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return FisherProducts(parameters, rates, x_spt, y_spt, x_qry, weights, plan, steps, first_order, seed=seed)(v)


def _fisher_vector_product_fake(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    weights: Tensor | None, v: list[Tensor], plan: str, steps: int, first_order: bool,
    seed: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in v]


# -- at each task's own parameters ---------------------------------------------------------------------------

LIBRARY.define("predict_forward(Tensor[] fast, Tensor x, str plan, Tensor? seed=None, Tensor? counts=None) -> Tensor")
LIBRARY.define(
    "predict_backward(Tensor[] fast, Tensor x, Tensor cotangent, str plan, Tensor? seed=None, Tensor? counts=None) "
    "-> Tensor[]"
)
LIBRARY.define("loss_and_grad(Tensor[] fast, Tensor x, Tensor?[] y, str plan, Tensor? seed=None) -> (Tensor, Tensor[])")
LIBRARY.define("hvp(Tensor[] fast, Tensor x, Tensor?[] y, Tensor[] v, str plan, Tensor? seed=None) -> Tensor[]")
LIBRARY.define(
    "inner_step(Tensor[] fast, Tensor[] rates, Tensor x, Tensor?[] y, str plan, int step=0, Tensor? seed=None) "
    "-> Tensor[]"
)


def _own(fast: list[Tensor]) -> dict[str, list[Any]]:
    """The arguments of a run at per-task parameters."""
    parts, strides = _by_task(fast)
    return {"parameters": parts, "parameter_strides": strides}


def _inner_step(
    fast: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, plan: str, step: int = 0,
    seed: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """One step of adapt_forward from parameters that are each task's own: the adapted parameters after it. Only the CPU
    backend has it; on a GPU the tasks of an adapt share their parameters."""
    tasks, n, *sample = x.shape
    problem = problem_of(plan, "adapt", tuple(sample), n, 0, 1, True, is_double(x), *padding.of_problem(y))
    if problem.backend != "cpu":
        raise NotImplementedError("inner_step runs on a CPU alone")
    support = problem.support("y_spt", x, y)
    rates = dense(rates)
    after = _inner_step_fake(fast, rates, x, y, plan)
    problem.run(
        x, tasks, **_own(fast), rates=rates, support=support, per_task=spread(plan, after),
        first_step=step, **_seeded(seed), **padding.of_support(problem, y),
    )  # fmt: skip
    return after


def _inner_step_fake(
    fast: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, plan: str, step: int = 0,
    seed: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in adapted(plan, fast)]


def _predicting(plan: str, operation: str, x: Tensor, counts: Tensor | None) -> Problem:
    weighted = ((), True) if counts is not None and plan_of(plan).backend != "cpu" else ()
    return problem_of(plan, operation, tuple(x.shape[2:]), 0, x.shape[1], 0, False, is_double(x), *weighted)


def _predict_forward(
    fast: list[Tensor], x: Tensor, plan: str, seed: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """counts: the first so many samples of a task are its set, int64 [tasks]; None: all."""
    tasks, n = x.shape[:2]
    problem = _predicting(plan, "predict", x, counts)
    x = x.contiguous()
    logits = x.new_empty((tasks, n, problem.features))
    problem.run(
        x, tasks, **_own(fast), query=padding.set_of(problem, x, counts), logits=logits, **_seeded(seed),
        **padding.of_query(problem, counts),
    )  # fmt: skip
    return logits if counts is None else padding.blank(logits, counts)


def _predict_fake(
    fast: list[Tensor], x: Tensor, plan: str, seed: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], features(plan, x)))


def _predict_backward(
    fast: list[Tensor], x: Tensor, cotangent: Tensor, plan: str, seed: Tensor | None = None,
    counts: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    tasks, problem = x.shape[0], _predicting(plan, "predict_backward", x, counts)
    x, cotangent = dense([x, cotangent])
    if counts is not None:
        cotangent = padding.blank(cotangent.clone(), counts)
    grads = _like_fast(fast, plan)
    problem.run(
        x, tasks, **_own(fast), query=padding.set_of(problem, x, counts), given=[cotangent], per_task=grads,
        **_seeded(seed), **padding.of_query(problem, counts),
    )  # fmt: skip
    return grads


def _like_fast(fast: list[Tensor], plan: str) -> list[Tensor]:
    """A tensor for the result of each parameter; an empty one for a buffer, which has none."""
    parameters = plan_of(plan).parameters
    return [t.new_empty(0 if p.role == "buffer" else t.shape) for t, p in zip(fast, parameters, strict=True)]


def _predict_backward_fake(
    fast: list[Tensor], x: Tensor, cotangent: Tensor, plan: str, seed: Tensor | None = None,
    counts: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return _like_fast(fast, plan)


def _loss_and_grad(
    fast: list[Tensor], x: Tensor, y: TargetList, plan: str, seed: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    tasks, n, *sample = x.shape
    problem = problem_of(plan, "loss_and_grad", tuple(sample), n, 0, 0, False, is_double(x), *padding.of_problem(y))
    support = problem.data("y", x, y)
    losses, grads = _loss_and_grad_fake(fast, x, y, plan)
    problem.run(
        x, tasks, **_own(fast), support=support, losses=[None, losses, None], per_task=grads, **_seeded(seed),
        **padding.of_support(problem, y),
    )  # fmt: skip
    return losses, grads


def _loss_and_grad_fake(
    fast: list[Tensor], x: Tensor, y: TargetList, plan: str, seed: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape[0]), _like_fast(fast, plan)


def _hvp(
    fast: list[Tensor], x: Tensor, y: TargetList, v: list[Tensor], plan: str, seed: Tensor | None = None
) -> list[Tensor]:
    tasks, n, *sample = x.shape
    problem = problem_of(plan, "hvp", tuple(sample), n, 0, 0, False, is_double(x), *padding.of_problem(y))
    support = problem.data("y", x, y)
    directions, strides = _by_task(v)
    products = _like_fast(fast, plan)
    problem.run(
        x, tasks, **_own(fast), support=support, given=directions, given_strides=strides, per_task=products,
        **_seeded(seed), **padding.of_support(problem, y),
    )  # fmt: skip
    return products


def _hvp_fake(
    fast: list[Tensor], x: Tensor, y: TargetList, v: list[Tensor], plan: str, seed: Tensor | None = None
) -> list[Tensor]:
    return _like_fast(fast, plan)


for _name, _kernel, _fake in (
    ("meta_gradient", _meta_gradient, _meta_gradient_fake),
    ("meta_gradient_of_data", _meta_gradient_of_data, _meta_gradient_of_data_fake),
    ("fisher_vector_product", _fisher_vector_product, _fisher_vector_product_fake),
    ("adapt_forward", _adapt_forward, _adapt_fake),
    ("adapt_backward", _adapt_backward, _adapt_backward_fake),
    ("inner_step", _inner_step, _inner_step_fake),
    ("predict_forward", _predict_forward, _predict_fake),
    ("predict_backward", _predict_backward, _predict_backward_fake),
    ("loss_and_grad", _loss_and_grad, _loss_and_grad_fake),
    ("hvp", _hvp, _hvp_fake),
):
    LIBRARY.impl(_name, _kernel, "CPU")
    LIBRARY.impl(_name, _kernel, "CUDA")
    # Their results never require grad: the differentiable ops are in autograd.py.
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"maml_cuda::{_name}", _fake, lib=LIBRARY)

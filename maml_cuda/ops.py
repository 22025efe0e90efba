"""The fused calls as torch.library ops: schemas, implementations, fake kernels, autograd.

An op is a pure function of its tensors and of `plan`, the JSON text of a plan (binding.py writes it), so that a
compiled or exported program needs nothing else. Ops that compute have no autograd of their own; `attach`, `adapt` and
`predict` do: one node each, whose backward is one more op and can be differentiated no further. A meta-step that nobody
watches (`signature`) does without the dispatcher, which would take a third of a small one: `meta_step` and `attached`.

    meta_gradient   loss, task losses, logits, support losses, the flat gradient of parameters and learned rates
    attach          the loss again, with that gradient as its backward
    adapt           the adapted parameters of every task, and the support losses
    fisher_vector_product    of the adapted policies, through the inner loop
    predict, loss_and_grad, hvp    at parameters that are each task's own

A target is a list: one tensor, or the four fields of a PolicyTarget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from . import _core, checks, device, targets
from .targets import POLICY_LOSSES, PolicyTarget, Target

TargetList = list[Tensor | None]

_LIBRARY = torch.library.Library("maml_cuda", "DEF")


@lru_cache(maxsize=256)
def _plan(text: str) -> dict[str, Any]:
    return json.loads(text)


class _Problem:
    """Everything that follows from the signature of a call."""

    __slots__ = (
        "at_once",
        "backend",
        "core",
        "gradient_size",
        "graphs",
        "loss",
        "prediction",
        "runners",
        "target",
        "workspaces",
    )

    def __init__(
        self, text: str, operation: str, sample: tuple[int, ...], n_support: int, n_query: int, steps: int,
        first_order: bool, double: bool, query_steps: tuple[int, ...] = (),
    ):  # fmt: skip
        plan = _plan(text)
        self.backend = plan.get("backend", "cpu")
        self.core = _core.Problem(
            plan,
            operation,
            list(sample),
            n_support,
            n_query,
            steps,
            first_order,
            double,
            self.backend,
            list(query_steps),
        )
        self.prediction = tuple(self.core.prediction)
        self.loss = plan["loss"]
        halves = 2 if self.loss == "gaussian_policy_gradient" else 1  # mean and log_std beside each other
        self.target = (*self.prediction[:-1], self.prediction[-1] // halves)  # shape of one sample's mean
        self.gradient_size = _gradient_size(text)
        self.at_once = plan.get("task_chunk")
        self.graphs = plan.get("cuda_graphs", True)
        self.workspaces: dict[tuple[int, int], int] = {}  # of the CPU: (tasks, threads) -> elements
        self.runners: dict[torch.device, device.Runner] = {}

    def run(self, like: Tensor, tasks: int, **addresses: Any) -> None:
        if self.backend == "cuda":
            self.runner(like.device).run(like, tasks, self.at_once or tasks, self.graphs, addresses)
            return
        threads = torch.get_num_threads()
        size = self.workspaces.get((tasks, threads))
        if size is None:
            size = self.workspaces[tasks, threads] = self.core.workspace(tasks, threads)
        workspace = like.new_empty(size)
        self.core.run(_core.Call(tasks, threads, workspace=workspace.data_ptr(), **addresses))

    def runner(self, on: torch.device) -> device.Runner:
        runner = self.runners.get(on)
        if runner is None:
            runner = self.runners[on] = device.Runner(_core, self.core, on)
        return runner

    def workspace_bytes(self, like: Tensor, tasks: int) -> int:
        if self.backend == "cuda":
            elements = self.runner(like.device).workspace(tasks, self.at_once or tasks)
        else:
            elements = self.core.workspace(tasks, torch.get_num_threads())
        return elements * like.element_size()

    def data(self, name: str, x: Tensor, y: list[Tensor | None]) -> list[Tensor | None]:
        """x and what its loss compares, dense: y, and of a policy what each sample counts and its old log-probability.

        Raises:
            ValueError: a target that does not fit the prediction.
        """
        y = [None if t is None else t.resolve_neg() for t in y]  # which the dispatcher leaves to us in a list
        target: Target = PolicyTarget(*y) if self.loss in POLICY_LOSSES else y[0]  # type: ignore[arg-type,assignment]
        checks.target(name, self.loss, target, self.target)
        if isinstance(target, Tensor):
            return [x.contiguous(), target.contiguous(), None, None]
        if self.backend == "cpu":
            checks.target_values(name, target, None)  # the core looks at the actions
        scale, old = targets.coefficients(target), target.old_log_probs
        return [*_dense([x, target.actions, scale]), None if old is None else old.contiguous()]


# (plan, operation, sample, n_support, n_query, steps, first_order, double, query_steps)
_problem = lru_cache(maxsize=1024)(_Problem)


def why_not(plan: str, sample: tuple[int, ...], n_support: int, n_query: int, dtype: torch.dtype) -> str:
    """The sentence why no fused layer fits samples of this shape, or nothing.

    Raises:
        ValueError: they do not fit a layer of the model.
    """
    try:
        _problem(plan, "meta_loss", tuple(sample), n_support, n_query, 0, True, dtype == torch.float64)
    except _core.Unsupported as reason:
        return str(reason)
    return ""


def workspace_bytes(
    plan: str, x_spt: Tensor, x_qry: Tensor, steps: int, first_order: bool, query_steps: list[int]
) -> int:
    """What a meta-step takes beside its tensors."""
    tasks, n_support, *sample = x_spt.shape
    double = x_spt.dtype == torch.float64
    problem = _problem(
        plan, "meta_gradient", tuple(sample), n_support, x_qry.shape[1], steps, first_order, double, tuple(query_steps)
    )
    return problem.workspace_bytes(x_spt, tasks)


def is_plain(t: Any) -> bool:
    """Whether it is a tensor of torch's own, and its memory holds what it says."""
    return (type(t) is Tensor or type(t) is torch.nn.Parameter) and not t.is_neg()


def signature(*data: Any) -> tuple | None:
    """All of these tensors that their checks look at, as a key; None where going past the dispatcher would be seen: by
    a compiler or trace, a mode, a transform, a profiler, autograd on the data, or a subclass of Tensor."""
    if (
        torch.compiler.is_compiling()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return None
    key: list[Any] = [torch.is_grad_enabled()]
    for t in data:
        if type(t) is not Tensor or t.requires_grad or t.is_neg():
            return None
        key += t.shape, t.dtype, t.device
    return tuple(key)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """0 says absent."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def _by_task(tensors: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Per-task tensors [tasks, *shape], each task's part dense, and the strides from task to task (0: one for all)."""
    parts = []
    for t in tensors:
        shared = t.stride(0) == 0 and t[0].is_contiguous()
        parts.append(t if shared else t.contiguous())
    return parts, [0 if t.stride(0) == 0 else t[0].numel() for t in parts]


def _sizes(plan: str, roles: tuple[str, ...]) -> list[int]:
    return [p["size"] for p in _plan(plan)["parameters"] if p["role"] in roles]


def _gradient_size(plan: str) -> int:
    learned = sum(r["size"] for r in _plan(plan)["rate_tensors"] if r["learned"])
    return sum(_sizes(plan, ("adapted", "outer"))) + learned


def _adapted(plan: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t for t, p in zip(tensors, _plan(plan)["parameters"], strict=True) if p["role"] == "adapted"]


def _spread(plan: str, adapted: list[Tensor]) -> list[Tensor | None]:
    """One entry a parameter: the adapted ones' tensors, None for the others."""
    rest = iter(adapted)
    return [next(rest) if p["role"] == "adapted" else None for p in _plan(plan)["parameters"]]


def prediction_shape(plan: str, x: Tensor) -> tuple[int, ...]:
    """Of one sample of x [tasks, n, ...]."""
    return _problem(
        plan,
        "predict",
        tuple(int(d) for d in x.shape[2:]),
        0,
        int(x.shape[1]),
        0,
        False,
        x.dtype == torch.float64,
    ).prediction


# -- meta_gradient -------------------------------------------------------------------------------------------

_LIBRARY.define(
    "meta_gradient(Tensor[] parameters, Tensor[] rates, Tensor x_spt, Tensor?[] y_spt, Tensor x_qry, Tensor?[] y_qry, "
    "Tensor? task_weights, str plan, int steps, bool first_order, bool gradient, Tensor? query_weights=None, "
    "int[] query_steps=[]) "
    "-> (Tensor loss, Tensor task_losses, Tensor logits, Tensor support_losses, Tensor gradient)"
)


def _meta_gradient(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, plan: str, steps: int, first_order: bool, gradient: bool,
    query_weights: Tensor | None = None, query_steps: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = meta_problem(plan, x_spt, x_qry, steps, first_order, gradient, query_steps)
    support, query = problem.data("y_spt", x_spt, y_spt), problem.data("y_qry", x_qry, y_qry)
    return meta_step(problem, parameters, rates, support, query, task_weights, query_weights, steps, gradient)


def meta_problem(
    plan: str, x_spt: Tensor, x_qry: Tensor, steps: int, first_order: bool, gradient: bool,
    query_steps: Sequence[int] = (),
) -> _Problem:  # fmt: skip
    """What `meta_step` needs beside tensors."""
    operation = "meta_gradient" if gradient else "meta_loss"
    sample = tuple(x_spt.shape[2:])
    double = x_spt.dtype == torch.float64
    return _problem(
        plan, operation, sample, x_spt.shape[1], x_qry.shape[1], steps, first_order, double, tuple(query_steps)
    )


def meta_data(x: Tensor, y: Any) -> list[Tensor | None]:
    """_Problem.data of tensors, y among them, that have been checked."""
    return [x.contiguous(), y.contiguous(), None, None]


def meta_step(
    problem: _Problem, parameters: list[Tensor], rates: list[Tensor], support: list[Tensor | None],
    query: list[Tensor | None], task_weights: Tensor | None, query_weights: Tensor | None, steps: int, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op meta_gradient, on data that have been checked."""
    x_spt, x_qry = cast(Tensor, support[0]), cast(Tensor, query[0])
    parameters, rates = _dense(parameters), _dense(rates)
    tasks = x_spt.shape[0]
    outputs = _meta_outputs(x_qry, tasks, problem.prediction, steps, problem.gradient_size if gradient else 0)
    loss, task_losses, logits, support_losses, flat = outputs
    if task_weights is not None:
        task_weights = task_weights.contiguous()
    problem.run(
        x_spt, tasks,
        parameters=_addresses(parameters),
        rates=_addresses(rates),
        support=_addresses(support),
        query=_addresses(query),
        task_weights=0 if task_weights is None else task_weights.data_ptr(),
        query_weights=0 if query_weights is None else query_weights.data_ptr(),
        losses=[loss.data_ptr(), task_losses.data_ptr(), support_losses.data_ptr()],
        logits=logits.data_ptr(),
        gradient=flat.data_ptr() if gradient else 0,
    )  # fmt: skip
    return outputs


def _meta_outputs(
    like: Tensor, tasks: int, prediction: tuple[int, ...], steps: int, gradient: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        like.new_empty(()),
        like.new_empty(tasks),
        like.new_empty((tasks, like.shape[1], *prediction)),
        like.new_empty((tasks, steps)),
        like.new_empty(gradient),
    )


def _meta_gradient_fake(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    y_qry: TargetList, task_weights: Tensor | None, plan: str, steps: int, first_order: bool, gradient: bool,
    query_weights: Tensor | None = None, query_steps: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    prediction = prediction_shape(plan, x_qry)
    return _meta_outputs(x_qry, x_qry.shape[0], prediction, steps, _gradient_size(plan) if gradient else 0)


# -- adapt ---------------------------------------------------------------------------------------------------

_LIBRARY.define(
    "adapt_forward(Tensor[] parameters, Tensor[] rates, Tensor x, Tensor?[] y, str plan, int steps) "
    "-> (Tensor[], Tensor)"
)
_LIBRARY.define(
    "adapt_backward(Tensor[] parameters, Tensor[] rates, Tensor x, Tensor?[] y, Tensor[] cotangents, str plan, "
    "int steps, bool first_order) -> Tensor"
)


def _adapt_forward(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, plan: str, steps: int
) -> tuple[list[Tensor], Tensor]:
    tasks, n, *sample = x.shape
    problem = _problem(plan, "adapt", tuple(sample), n, 0, steps, True, x.dtype == torch.float64)
    support = problem.data("y_spt", x, y)
    parameters, rates = _dense(parameters), _dense(rates)
    fast, support_losses = _adapt_fake(parameters, rates, x, y, plan, steps)
    problem.run(
        x, tasks,
        parameters=_addresses(parameters),
        rates=_addresses(rates),
        support=_addresses(support),
        losses=[0, 0, support_losses.data_ptr()],
        per_task=_addresses(_spread(plan, fast)),
    )  # fmt: skip
    return fast, support_losses


def _adapt_fake(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, plan: str, steps: int
) -> tuple[list[Tensor], Tensor]:
    tasks = x.shape[0]
    fast = [p.new_empty((tasks, *p.shape)) for p in _adapted(plan, parameters)]
    return fast, x.new_empty((tasks, steps))


def _adapt_backward(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, cotangents: list[Tensor], plan: str,
    steps: int, first_order: bool,
) -> Tensor:  # fmt: skip
    tasks, n, *sample = x.shape
    problem = _problem(plan, "adapt_backward", tuple(sample), n, 0, steps, first_order, x.dtype == torch.float64)
    support = problem.data("y_spt", x, y)
    parameters, rates = _dense(parameters), _dense(rates)
    given, strides = _by_task(cotangents)
    gradient = x.new_empty(_gradient_size(plan))
    spread = _addresses(_spread(plan, given))
    steps_of = iter(strides)
    problem.run(
        x, tasks,
        parameters=_addresses(parameters),
        rates=_addresses(rates),
        support=_addresses(support),
        given=spread,
        given_strides=[next(steps_of) if address else 0 for address in spread],
        gradient=gradient.data_ptr(),
    )  # fmt: skip
    return gradient


def _adapt_backward_fake(
    parameters: list[Tensor], rates: list[Tensor], x: Tensor, y: TargetList, cotangents: list[Tensor], plan: str,
    steps: int, first_order: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(_gradient_size(plan))


# -- fisher_vector_product -----------------------------------------------------------------------------------

_LIBRARY.define(
    "fisher_vector_product(Tensor[] parameters, Tensor[] rates, Tensor x_spt, Tensor?[] y_spt, Tensor x_qry, "
    "Tensor? weights, Tensor[] v, str plan, int steps, bool first_order) -> Tensor[]"
)


def _fisher_vector_product(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    weights: Tensor | None, v: list[Tensor], plan: str, steps: int, first_order: bool,
) -> list[Tensor]:  # fmt: skip
    """v: of each trainable parameter, in order."""
    tasks, n_support, *sample = x_spt.shape
    double = x_spt.dtype == torch.float64
    problem = _problem(plan, "fisher", tuple(sample), n_support, x_qry.shape[1], steps, first_order, double)
    if weights is not None and problem.backend == "cpu":
        checks.sample_weights("weights", weights)
    scale = x_qry.new_ones(x_qry.shape[:2]) if weights is None else weights
    support, query = problem.data("y_spt", x_spt, y_spt), [x_qry.contiguous(), None, targets.shares(scale), None]
    parameters, rates, v = _dense(parameters), _dense(rates), _dense(v)
    products = _fisher_vector_product_fake(parameters, rates, x_spt, y_spt, x_qry, weights, v, plan, steps, first_order)
    flat = x_spt.new_empty(sum(t.numel() for t in v))
    rest = iter(v)
    given = [None if p["role"] == "frozen" else next(rest) for p in _plan(plan)["parameters"]]
    problem.run(
        x_spt, tasks,
        parameters=_addresses(parameters),
        rates=_addresses(rates),
        support=_addresses(support),
        query=_addresses(query),
        given=_addresses(given),
        given_strides=[0] * len(given),  # one for all tasks
        gradient=flat.data_ptr(),
    )  # fmt: skip
    for product, part in zip(products, _cut(flat, v), strict=True):
        product.copy_(part)
    return products


def _fisher_vector_product_fake(
    parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: TargetList, x_qry: Tensor,
    weights: Tensor | None, v: list[Tensor], plan: str, steps: int, first_order: bool,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in v]


# -- at each task's own parameters ---------------------------------------------------------------------------

_LIBRARY.define("predict_forward(Tensor[] fast, Tensor x, str plan) -> Tensor")
_LIBRARY.define("predict_backward(Tensor[] fast, Tensor x, Tensor cotangent, str plan) -> Tensor[]")
_LIBRARY.define("loss_and_grad(Tensor[] fast, Tensor x, Tensor?[] y, str plan) -> (Tensor, Tensor[])")
_LIBRARY.define("hvp(Tensor[] fast, Tensor x, Tensor?[] y, Tensor[] v, str plan) -> Tensor[]")


def _own(fast: list[Tensor]) -> tuple[dict[str, list[int]], list[Tensor]]:
    """The arguments of a run at per-task parameters, and the tensors that they point into."""
    parts, strides = _by_task(fast)
    return {"parameters": _addresses(parts), "parameter_strides": strides}, parts


def _predict_forward(fast: list[Tensor], x: Tensor, plan: str) -> Tensor:
    tasks, n, *sample = x.shape
    problem = _problem(plan, "predict", tuple(sample), 0, n, 0, False, x.dtype == torch.float64)
    own, _keep = _own(fast)
    x = x.contiguous()
    logits = x.new_empty((tasks, n, *problem.prediction))
    problem.run(x, tasks, **own, query=_addresses([x, None, None, None]), logits=logits.data_ptr())
    return logits


def _predict_fake(fast: list[Tensor], x: Tensor, plan: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], *prediction_shape(plan, x)))


def _predict_backward(fast: list[Tensor], x: Tensor, cotangent: Tensor, plan: str) -> list[Tensor]:
    tasks, n, *sample = x.shape
    problem = _problem(plan, "predict_backward", tuple(sample), 0, n, 0, False, x.dtype == torch.float64)
    own, _keep = _own(fast)
    x, cotangent = _dense([x, cotangent])
    grads = _like_fast(fast, plan)
    problem.run(
        x, tasks, **own, query=_addresses([x, None, None, None]), given=[cotangent.data_ptr()],
        per_task=_addresses(grads),
    )  # fmt: skip
    return grads


def _like_fast(fast: list[Tensor], plan: str) -> list[Tensor]:
    """Of a buffer nothing is computed."""
    buffers = [p.get("buffer", False) for p in _plan(plan)["parameters"]]
    return [t.new_empty(0 if buffer else t.shape) for t, buffer in zip(fast, buffers, strict=True)]


def _predict_backward_fake(fast: list[Tensor], x: Tensor, cotangent: Tensor, plan: str) -> list[Tensor]:
    return _like_fast(fast, plan)


def _loss_and_grad(fast: list[Tensor], x: Tensor, y: TargetList, plan: str) -> tuple[Tensor, list[Tensor]]:
    tasks, n, *sample = x.shape
    problem = _problem(plan, "loss_and_grad", tuple(sample), n, 0, 0, False, x.dtype == torch.float64)
    support = problem.data("y", x, y)
    own, _keep = _own(fast)
    losses, grads = _loss_and_grad_fake(fast, x, y, plan)
    problem.run(
        x, tasks, **own, support=_addresses(support), losses=[0, losses.data_ptr(), 0],
        per_task=_addresses(grads),
    )  # fmt: skip
    return losses, grads


def _loss_and_grad_fake(fast: list[Tensor], x: Tensor, y: TargetList, plan: str) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape[0]), _like_fast(fast, plan)


def _hvp(fast: list[Tensor], x: Tensor, y: TargetList, v: list[Tensor], plan: str) -> list[Tensor]:
    tasks, n, *sample = x.shape
    problem = _problem(plan, "hvp", tuple(sample), n, 0, 0, False, x.dtype == torch.float64)
    support = problem.data("y", x, y)
    own, _keep = _own(fast)
    directions, strides = _by_task(v)
    products = _like_fast(fast, plan)
    problem.run(
        x, tasks, **own, support=_addresses(support), given=_addresses(directions),
        given_strides=strides, per_task=_addresses(products),
    )  # fmt: skip
    return products


def _hvp_fake(fast: list[Tensor], x: Tensor, y: TargetList, v: list[Tensor], plan: str) -> list[Tensor]:
    return _like_fast(fast, plan)


for _name, _kernel, _fake in (
    ("meta_gradient", _meta_gradient, _meta_gradient_fake),
    ("fisher_vector_product", _fisher_vector_product, _fisher_vector_product_fake),
    ("adapt_forward", _adapt_forward, _adapt_fake),
    ("adapt_backward", _adapt_backward, _adapt_backward_fake),
    ("predict_forward", _predict_forward, _predict_fake),
    ("predict_backward", _predict_backward, _predict_backward_fake),
    ("loss_and_grad", _loss_and_grad, _loss_and_grad_fake),
    ("hvp", _hvp, _hvp_fake),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    _LIBRARY.impl(_name, _kernel, "CUDA")
    # Their results never require grad: what is differentiable goes through the ops below.
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"maml_cuda::{_name}", _fake, lib=_LIBRARY)


# -- autograd ------------------------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """Passes gradients on and ties them to the inputs they depend on, so that a second backward raises instead of
    losing its terms: the gradient of a meta-gradient is a third derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"the gradient of {ctx.what} cannot be differentiated again (that is third order in the model); "
            'backend="reference" with a hand-written loop can'
        )


def _once(what: str, grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients, differentiable in name only where autograd records this backward (create_graph=True)."""
    if not torch.is_grad_enabled():
        return grads
    return list(_Once.apply(len(grads), what, *grads, *inputs))


def _cut(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """`flat` as tensors shaped as `like`."""
    if type(flat) is Tensor:
        return torch._C._nn.unflatten_dense_tensors(flat, like)
    parts = flat.split([math.prod(t.shape) for t in like])  # traced: sizes may be symbols
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, flat: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.inputs = inputs  # for shapes and for _once; not their values, which a step may have changed since
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        grads = _cut(flat.mul(grad), ctx.inputs)
        return (None, None, *_once("a meta-gradient", grads, [grad, *ctx.inputs]))


class _Attached(_Attach):
    """The same for a loss that nobody else holds, so that it need not be copied."""

    @staticmethod
    def forward(ctx: Any, held: tuple[Tensor, Tensor], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        loss, flat = held
        ctx.save_for_backward(flat)
        ctx.inputs = inputs
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Attach.backward(ctx, grad)[1:]


def attached(loss: Tensor, flat: Tensor, inputs: list[Tensor]) -> Tensor:
    """The op attach, past the dispatcher, on a fresh loss."""
    return _Attached.apply((loss, flat), *inputs)


_LIBRARY.define("attach(Tensor loss, Tensor flat, Tensor[] inputs) -> Tensor")


def _attach(loss: Tensor, flat: Tensor, inputs: list[Tensor]) -> Tensor:
    """`loss`, whose gradient by the concatenation of `inputs` is `flat`."""
    return _Attach.apply(loss, flat, *inputs)


_LIBRARY.impl("attach", _attach, "CompositeImplicitAutograd")


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: str,
        steps: int,
        first_order: bool,
        parameters: int,
        x: Tensor,
        y: TargetList,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call = plan, steps, first_order, parameters
        ctx.fields = len(y)
        ctx.save_for_backward(x, *y, *tensors)
        fast, support_losses = torch.ops.maml_cuda.adapt_forward(
            tensors[:parameters], tensors[parameters:], x, y, plan, steps
        )
        ctx.mark_non_differentiable(support_losses)
        return (*fast, support_losses)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        plan, steps, first_order, count = ctx.call
        x, *tensors = ctx.saved_tensors
        y, tensors = tensors[: ctx.fields], tensors[ctx.fields :]
        flat = torch.ops.maml_cuda.adapt_backward(
            tensors[:count], tensors[count:], x, y, list(cotangents[:-1]), plan, steps, first_order
        )
        description = _plan(plan)
        has_gradient = [p["role"] != "frozen" for p in description["parameters"]]
        has_gradient += [r["learned"] for r in description["rate_tensors"]]
        wanted = [t for t, yes in zip(tensors, has_gradient, strict=True) if yes]
        grads = iter(_once("adapt", _cut(flat, wanted), [*cotangents[:-1], *wanted]))
        return (None,) * 6 + tuple(next(grads) if yes else None for yes in has_gradient)


_LIBRARY.define(
    "adapt(Tensor[] parameters, Tensor[] rates, Tensor x, Tensor?[] y, str plan, int steps, bool first_order) "
    "-> (Tensor[], Tensor)"
)


def _adapt(
    parameters: list[Tensor],
    rates: list[Tensor],
    x: Tensor,
    y: TargetList,
    plan: str,
    steps: int,
    first_order: bool,
) -> tuple[list[Tensor], Tensor]:
    *fast, support_losses = _Adapt.apply(plan, steps, first_order, len(parameters), x, y, *parameters, *rates)
    return fast, support_losses


_LIBRARY.impl("adapt", _adapt, "CompositeImplicitAutograd")


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: str, x: Tensor, *fast: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(x, *fast)
        return torch.ops.maml_cuda.predict_forward(fast, x, plan)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, *fast = ctx.saved_tensors
        grads = torch.ops.maml_cuda.predict_backward(fast, x, cotangent, ctx.plan)
        return (None, None, *_once("predict", grads, [cotangent, *fast]))


_LIBRARY.define("predict(Tensor[] fast, Tensor x, str plan) -> Tensor")


def _predict(fast: list[Tensor], x: Tensor, plan: str) -> Tensor:
    return _Predict.apply(plan, x, *fast)


_LIBRARY.impl("predict", _predict, "CompositeImplicitAutograd")

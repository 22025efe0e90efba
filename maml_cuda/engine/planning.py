"""Makes the plan of a model: what its fused layers are, and what the inner loop does to each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import reference
from maml_cuda.batch_norm import PerStepBatchNorm
from maml_cuda.engine import cuda_runner, data_checks
from maml_cuda.engine.settings import Settings, adapted_names
from maml_cuda.plan import reader
from maml_cuda.plan.graph import Graph
from maml_cuda.plan.schema import InnerRate, Parameter, Plan, RateTensor, Role
from maml_cuda.rates import InnerRates, Rate, read_rates

Holder = tuple[dict[str, Any], str]  # where a tensor is read from at each call: a registry of its module, and its key


@dataclass(frozen=True)
class Planned:
    """A plan, and the tensors that it is of.

    names: of the plan's parameters, and of the buffers that it reads.
    adapted: those of them that the inner loop changes.
    slots: of each of them, the slots where there is one for each inner step.
    holders: of each of them, then of each rate tensor.
    served_by: module path -> fused layers.
    log_std: of a model that returns (mean, log_std), which in the plan are one tensor: "shared" or "rows" (Graph).
    """

    plan: Plan
    names: list[str]
    adapted: list[str]
    slots: list[int | None]
    holders: list[Holder]
    served_by: dict[str, list[str]]
    log_std: str


def planned(maml: Settings, like: Tensor) -> Planned:
    """The plan of the model with its training flags as they are; `like` is one of its trainable parameters.

    Raises:
        Unfusable: the reason why there is none.
        ValueError: an adapted parameter that does not reach the support loss; a loss that does not fit the model.
    """
    model, loss = maml.model, maml.loss
    if not isinstance(loss, str):
        raise reader.Unfusable(f"the loss {getattr(loss, '__name__', type(loss).__name__)} is a callable of yours")
    if why_not := cuda_runner.why_not(like.device):
        raise reader.Unfusable(why_not)
    if like.dtype not in (torch.float32, torch.float64):
        raise reader.Unfusable(f"the model is {like.dtype}; fused are float32 and float64")
    graph = reader.trace(model)
    data_checks.returns_policy(loss, bool(graph.log_std))
    adapted = adapted_names(maml)
    names = [read.name for read in graph.reads]
    if unreached := [name for name in adapted if name not in names]:
        raise reference.unreached(unreached)
    modules = dict(model.named_modules())
    owners = [modules[name.rpartition(".")[0]] for name in names]
    own = dict(model.named_parameters())
    rates = read_rates(maml.inner_lr, {name: own[name].shape for name in adapted}, maml.inner_steps)
    parameters, rate_tensors, rate_holders = _described(model, graph, rates, like, maml.inner_lr)
    backend, options = cuda_runner.backend_of(like.device), maml._options
    plan = Plan(
        nodes=tuple(graph.nodes),
        parameters=tuple(parameters),
        rate_tensors=tuple(rate_tensors),
        loss=loss,
        backend=backend,
        precision="float32" if backend == "cpu" else options.precision,
        recompute=options.recompute,
        cuda_graphs=options.cuda_graphs,
        task_chunk=options.task_chunk,
    )
    return Planned(
        plan=plan,
        names=names,
        adapted=sorted(adapted, key=names.index),
        slots=[m.steps if isinstance(m, PerStepBatchNorm) else None for m in owners],
        holders=[_holder(m, name) for m, name in zip(owners, names, strict=True)] + rate_holders,
        served_by=graph.served_by,
        log_std=graph.log_std,
    )


def _described(
    model: nn.Module, graph: Graph, rates: dict[str, Rate], like: Tensor, inner_lr: float | Tensor | InnerRates
) -> tuple[list[Parameter], list[RateTensor], list[Holder]]:
    """The plan's parameters, its rate tensors, and what holds each of these."""
    own, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    parameters: list[Parameter] = []
    rate_tensors: list[RateTensor] = []
    holders: list[Holder] = []
    shared: dict[int, int] = {}  # a tensor that is the rate of several parameters -> its index
    for index, read in enumerate(graph.reads):
        t, rate = own[read.name] if read.name in own else buffers[read.name], rates.get(read.name)
        if t.dtype != like.dtype or t.device != like.device:
            raise reader.Unfusable(f"{read.name} is {t.dtype} on {t.device}, unlike the model's parameters")
        described = None
        if rate is not None and not isinstance(rate.value, Tensor):
            described = InnerRate(rate.value, None, rate.per_step, rate.elementwise)
        elif rate is not None and isinstance(rate.value, Tensor):
            at = None if rate.elementwise else shared.get(id(rate.value))
            if at is None:
                at = shared[id(rate.value)] = len(rate_tensors)
                steps, of = len(rate.value) if rate.per_step else 1, index if rate.elementwise else None
                rate_tensors.append(RateTensor(rate.value.numel(), steps, of, rate.value.requires_grad))
                holders.append(_holder_of_rate(inner_lr, read.name, rate.value))
            described = InnerRate(None, at, rate.per_step, rate.elementwise)
        trained: Role = "adapted" if rate is not None else "outer" if t.requires_grad else "frozen"
        role = trained if read.name in own else "buffer"
        parameters.append(Parameter(t.numel(), read.rows, read.taps, read.slots, role, described))
    return parameters, rate_tensors, holders


def _holder(module: nn.Module, name: str) -> Holder:
    """What holds the parameter or buffer `name`, of this module of the model."""
    key = name.rpartition(".")[2]
    return (module._parameters if key in module._parameters else module._buffers), key


def _holder_of_rate(inner_lr: float | Tensor | InnerRates, name: str, rate: Tensor) -> Holder:
    """What holds the rate of the parameter `name`."""
    if not isinstance(inner_lr, InnerRates):
        return {"inner_lr": rate}, "inner_lr"
    path, _, key = name.rpartition(".")
    return _holder(inner_lr.get_submodule(path), key)

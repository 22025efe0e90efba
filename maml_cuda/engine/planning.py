"""Makes the program of a graph: what the inner loop does to each parameter that its layers read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maml_cuda import reference
from maml_cuda.batch_norm import PerStepBatchNorm
from maml_cuda.capture.copies import Place, places
from maml_cuda.capture.errors import Unfusable
from maml_cuda.engine import cuda_runner, own_targets
from maml_cuda.engine.data_checks import OF_CLASSES
from maml_cuda.engine.factors import factors_of
from maml_cuda.engine.hyperparameters import Hyperparameters, places_in
from maml_cuda.engine.program import Program
from maml_cuda.engine.settings import Options, Settings, adapted_names
from maml_cuda.gradient_scale import Scale
from maml_cuda.gradient_transforms import GradientTransform
from maml_cuda.losses import Loss
from maml_cuda.meta_curvature import MetaCurvature
from maml_cuda.optim import Groups, Optimizer, read
from maml_cuda.plan.graph import Graph, Labels
from maml_cuda.plan.own_loss import COMPUTED, Match
from maml_cuda.plan.schema import Parameter, Plan, RateTensor, Role
from maml_cuda.rates import InnerRates


@dataclass(frozen=True)
class Snapshot:
    """What a FusedMAML computes, as it was when its model was bound.

    Attributes:
        adapted: the names of the parameters that the inner loop changes.
        like: one of the model's trainable parameters.
        The others are FusedMAML's.
    """

    model: nn.Module
    loss: str | Callable[..., Tensor]
    inner_lr: float | Tensor | InnerRates
    inner_steps: int
    inner_optimizer: Optimizer | Groups | None
    inner_clip_norm: float | None
    inner_clip_value: float | None
    inner_transform: GradientTransform | None
    options: Options
    adapted: list[str]
    like: Tensor


def snapshot_of(maml: Settings, like: Tensor) -> Snapshot:
    """The snapshot of a FusedMAML as it is now."""
    return Snapshot(
        maml.model, maml.loss, maml.inner_lr, maml.inner_steps, maml.inner_optimizer, maml.inner_clip_norm,
        maml.inner_clip_value, maml.inner_transform, maml._options, adapted_names(maml), like,
    )  # fmt: skip


def why_not(snapshot: Snapshot) -> str:
    """The reason why fused layers serve no data at all, or ""."""
    on, dtype = snapshot.like.device, snapshot.like.dtype
    if reason := cuda_runner.why_not(on):
        return reason
    return "" if dtype in (torch.float32, torch.float64) else f"the model is {dtype}; fused are float32 and float64"


def program_of(snapshot: Snapshot, graph: Graph, match: Match | None) -> Program:
    """The program of a graph of the model.

    Args:
        match: the loss of the core for a loss of the user's own.

    Raises:
        Unfusable: the reason why there is none.
        ValueError: an adapted parameter does not reach the support loss.
    """
    model, options = snapshot.model, snapshot.options
    where = places(model)
    loss = match.loss if match is not None else _own_name(snapshot.loss, graph)
    if match is not None and match.loss == "mse" and match.weighted:
        loss, graph = "gaussian_policy_gradient", own_targets.with_unit_precision(graph)
        log_std = snapshot.like.new_full((math.prod(graph.returned.sample),), own_targets.LOG_STD)
        where[own_targets.LOG_STD_NAME] = Place({"log_std": log_std}, "log_std")
    for name, literal in graph.literals.items():
        t = literal.to(snapshot.like)
        where[name] = Place({name: t}, name)
    where.update({name: Place({name: t}, name) for name, t in graph.outside.items()})
    is_used = isinstance(snapshot.loss, str) or match is not None
    if is_used and graph.returned.log_softmax and match != COMPUTED and loss not in OF_CLASSES:
        raise Unfusable(
            f"the prediction is a log_softmax; fused is that for {' and '.join(OF_CLASSES)}, not for {loss}"
        )
    if loss in OF_CLASSES and is_used and len(graph.returned.sample) != 1:
        raise Unfusable(
            f"the fused {loss} takes a prediction [n, classes], got samples of shape {list(graph.returned.sample)}"
        )
    names = [read.name for read in graph.reads]
    labels = graph.labels
    if match is not None and match.loss in OF_CLASSES:
        labels = (Labels(match.leaf, math.prod(graph.returned.sample), None),)
    reached = graph.differentiated()
    if unreached := [name for name in snapshot.adapted if name not in reached]:
        raise reference.unreached(unreached)
    modules = dict(model.named_modules())
    owners = [modules[name.rpartition(".")[0]] for name in names]
    parameters, rate_tensors, rate_holders = _described(snapshot, graph, where, reached)
    backend = cuda_runner.backend_of(snapshot.like.device)
    plan = Plan(
        nodes=tuple(graph.nodes),
        parameters=tuple(parameters),
        rate_tensors=tuple(rate_tensors),
        prediction=graph.prediction,
        loss=loss,
        loss_value=graph.loss_value,
        target=graph.target,
        backend=backend,
        precision="float32" if backend == "cpu" else options.precision,
        clip_norm=snapshot.inner_clip_norm,
        clip_value=snapshot.inner_clip_value,
        meta_gradient=options.meta_gradient,
        recompute=options.recompute,
        segments=options.segments,
        per_step_support=options.per_step_support or options.support_batch is not None,
        data_gradient=(),
        cuda_graphs=options.cuda_graphs,
        task_chunk=options.task_chunk,
    )
    return Program(
        plan=plan,
        names=names,
        adapted=sorted(snapshot.adapted, key=names.index),
        slots=[m.steps if isinstance(m, PerStepBatchNorm) else None for m in owners],
        holders=[where[name] for name in names] + rate_holders,
        served_by=graph.served_by,
        whole_sets=graph.whole_sets,
        written=graph.written,
        ignored=graph.ignored,
        returned=graph.returned,
        loss=snapshot.loss,
        match=match,
        labels=labels,
        of_loss={name: t for name, t in graph.outside.items() if t.requires_grad},
        identities=graph.identities,
        integers=graph.integers,
    )


def _described(
    snapshot: Snapshot, graph: Graph, where: dict[str, Place], reached: set[str]
) -> tuple[list[Parameter], list[RateTensor], list[Place]]:
    """The plan's parameters, its rate tensors, and what holds each of these.

    Args:
        reached: the names of the tensors by which the loss has a derivative.
    """
    model, like = snapshot.model, snapshot.like
    own = dict(model.named_parameters())
    shapes = {name: own[name].shape for name in snapshot.adapted}
    inner = read(snapshot.inner_lr, shapes, snapshot.inner_steps, snapshot.inner_optimizer)
    if isinstance(snapshot.inner_transform, (Scale, MetaCurvature)):
        snapshot.inner_transform.check(snapshot.adapted)
    parameters: list[Parameter] = []
    tensors = Hyperparameters(_held(snapshot))
    for index, of in enumerate(graph.reads):
        t, update = where[of.name].tensor, inner.updates.get(of.name)
        if (t.dtype != like.dtype and (t.requires_grad or t.is_complex())) or t.device != like.device:
            raise Unfusable(f"{of.name} is {t.dtype} on {t.device}, unlike the model's parameters")
        described = None
        if update is not None:
            factors = factors_of(snapshot.inner_transform, of.name, t, of.rows, of.taps)
            described = tensors.update(update, index, factors)
        learned = t.requires_grad and of.name in reached
        trained: Role = "adapted" if update is not None else "outer" if learned else "frozen"
        role = trained if of.name in own or t.requires_grad else "buffer"
        parameters.append(Parameter(t.numel(), of.rows, of.taps, of.slots, role, described))
    return parameters, tensors.tensors, tensors.holders


def _held(snapshot: Snapshot) -> list[Place]:
    """The places of the tensors among rates, hyperparameters and what transforms gradients."""
    rates, optimizer, transform = snapshot.inner_lr, snapshot.inner_optimizer, snapshot.inner_transform
    of_update = places_in(optimizer, transform if isinstance(transform, nn.Module) else None)
    if isinstance(rates, InnerRates):
        return places_in(rates) + of_update
    held = [Place({"inner_lr": rates}, "inner_lr")] if isinstance(rates, Tensor) else []
    return held + of_update


def _own_name(loss: Loss, graph: Graph) -> str:
    """The name of a loss of ours; of a loss of the user's own that is not called, one that takes the prediction."""
    if isinstance(loss, str):
        return loss
    return "gaussian_policy_gradient" if graph.returned.log_std else "mse"

"""What MAML's meta-loss and meta-gradient would be with each fault that changes numbers: plain loops of autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_cuda import pytrees
from maml_cuda.functional import second_derivatives
from maml_cuda.losses import value_of
from maml_cuda.updates import InnerUpdate

# What normalises the support sets and the query sets.
AS_GIVEN = "as given"
QUERY_EVAL = "query sets in eval mode"
QUERY_TRAIN = "query sets in train mode"
ALL_EVAL = "all sets in eval mode"
ALL_TRAIN = "all sets in train mode"
TOGETHER = "support and query sets normalised together"
QUERY_TOGETHER = "query sets normalised together with support sets"
SUPPORT_STATISTICS = "query sets in eval mode, after the support sets have moved the running statistics"


@dataclass(frozen=True)
class Variant:
    """One way of computing the meta-gradient; the default is the exact one.

    Attributes:
        first_order: the inner gradients are constants.
        inner_factor: of the support loss, whose mean should be taken.
        query_factor: of the query loss.
        sets: one of the words above.
        chained: each task starts from the adapted weights of the one before.
    """

    first_order: bool = False
    inner_factor: float = 1.0
    query_factor: float = 1.0
    sets: str = AS_GIVEN
    chained: bool = False

    def deviations(self) -> int:
        return sum(
            (self.first_order, self.inner_factor != 1, self.query_factor != 1, self.sets != AS_GIVEN, self.chained)
        )


@dataclass
class Setting:
    """The meta-step that the user's step is compared with: a model in float64, and as reference.meta_gradient."""

    model: nn.Module
    loss: Callable[..., Tensor]
    inner: InnerUpdate
    steps: int
    data: tuple[Any, Any, Any, Any]

    @property
    def tasks(self) -> int:
        return pytrees.tasks(self.data[2])

    def factors(self, target: Any) -> list[float]:
        """What a mean over samples, elements or both is multiplied by where it is summed."""
        (y, *_) = pytrees.tensors(target)
        n, elements = y.shape[1], max(1, y[0].numel() // y.shape[1])
        return sorted({float(f) for f in (n, elements, n * elements)} - {1.0})


def candidates(setting: Setting) -> list[Variant]:
    """All combinations, those with fewer faults first."""
    modes = [AS_GIVEN]
    stateful = [m for m in setting.model.modules() if _has_mode(m)]
    if stateful:
        training = any(m.training for m in stateful)
        modes += [QUERY_EVAL, SUPPORT_STATISTICS, ALL_EVAL] if training else [QUERY_TRAIN, ALL_TRAIN]
        modes += [TOGETHER, QUERY_TOGETHER] if training and all(_cattable(t) for t in setting.data[::2]) else []
    found = [
        Variant(*choice)
        for choice in itertools.product(
            (False, True),
            (1.0, *setting.factors(setting.data[1])),
            (1.0, *setting.factors(setting.data[3])),
            modes,
            (False, True) if setting.tasks > 1 else (False,),
        )
    ]
    return sorted(found, key=Variant.deviations)


def _has_mode(m: nn.Module) -> bool:
    return isinstance(m, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))


def _cattable(tree: Any) -> bool:
    return isinstance(tree, Tensor)


def computed(setting: Setting, variant: Variant) -> tuple[float, dict[str, Tensor]]:
    """The meta-loss and the meta-gradient, the mean over tasks; zeros where a parameter has none."""
    model = setting.model
    theta: dict[str, Tensor] = dict(model.named_parameters())
    flags = [(m, m.training) for m in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    moved = buffers if variant.sets == SUPPORT_STATISTICS else None
    total: Any = 0.0
    phi: dict[str, Tensor] = theta
    try:
        with torch.enable_grad(), second_derivatives():
            for task in range(setting.tasks):
                xs, ys, xq, yq = (pytrees.of_task(part, task) for part in setting.data)
                _set_mode(model, variant.sets, query=False)
                phi = _adapted(setting, variant, phi if variant.chained else theta, moved, xs, ys, xq)
                _set_mode(model, variant.sets, query=True)
                other = xs if variant.sets in (TOGETHER, QUERY_TOGETHER) else None
                prediction = _prediction(model, phi, moved, xq, other)
                total = total + variant.query_factor * value_of(setting.loss, prediction, yq) / setting.tasks
                _set_flags(flags)
        trainable = {name: p for name, p in theta.items() if p.requires_grad}
        found = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    finally:
        _set_flags(flags)
    gradients = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trainable.items(), found, strict=True)
    }
    return total.item(), gradients


def _adapted(
    setting: Setting, variant: Variant, start: dict[str, Tensor], moved: dict[str, Tensor] | None, xs: Any, ys: Any,
    xq: Any,
) -> dict[str, Tensor]:  # fmt: skip
    phi = dict(start)
    state = setting.inner.start(phi)
    names = list(setting.inner.updates)
    for step in range(setting.steps):
        prediction = _prediction(setting.model, phi, moved, xs, xq if variant.sets == TOGETHER else None)
        value = variant.inner_factor * value_of(setting.loss, prediction, ys)
        found = torch.autograd.grad(
            value, [phi[n] for n in names], create_graph=not variant.first_order, allow_unused=True
        )
        grads = {n: torch.zeros_like(phi[n]) if g is None else g for n, g in zip(names, found, strict=True)}
        phi, state = setting.inner.step(phi, grads, state, step)
    return dict(phi)


def _prediction(model: nn.Module, phi: dict[str, Tensor], moved: dict[str, Tensor] | None, x: Any, other: Any) -> Any:
    """For x, called together with `other` if there is one. Running statistics move on in `moved`, if it is given."""
    buffers = {name: b.clone() for name, b in (dict(model.named_buffers()) if moved is None else moved).items()}
    together = x if other is None else torch.cat((x, other))
    result = functional_call(model, {**phi, **buffers}, (together,))
    if moved is not None:
        moved.update(buffers)
    return result if other is None else pytrees.mapped(lambda t: t[: len(x)], result)


def _set_mode(model: nn.Module, sets: str, query: bool) -> None:
    if sets in (ALL_EVAL, ALL_TRAIN):
        model.train(sets == ALL_TRAIN)
    elif query and sets in (QUERY_EVAL, QUERY_TRAIN, SUPPORT_STATISTICS):
        model.train(sets == QUERY_TRAIN)


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for m, training in flags:
        m.training = training

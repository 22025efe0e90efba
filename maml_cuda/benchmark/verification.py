"""Verification: compares a meta-gradient with the float64 reference, on the inputs that are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from maml_cuda import pytrees
from maml_cuda.benchmark.baselines import Step
from maml_cuda.diagnosis.borrowed import in_double

FLOAT64_TOLERANCE = 1e-10


class WrongGradient(Exception):
    """A meta-gradient differs from the reference."""


def relative_error(model: nn.Module, expected: Mapping[str, Tensor]) -> float:
    """The distance of the gradients in `.grad` from those expected."""
    return distance({name: p.grad for name, p in model.named_parameters()}, expected)


def distance(grads: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> float:
    """The maximum over parameters of `|grad - expected| / max(|expected|, 1e-3 |all gradients|)`.

    The lower bound is for gradients that are exactly zero, such as that of a bias before BatchNorm, where only rounding
    noise is left. NaN and a missing gradient give infinity. A gradient that `expected` lacks must be zero.
    """
    whole = torch.stack([g.norm() for g in expected.values()]).norm().item()
    worst = 0.0
    for name in {**grads, **expected}:
        grad, truth = grads.get(name), expected.get(name)
        if grad is None:
            if truth is None:
                continue
            return float("inf")
        truth = torch.zeros_like(in_double(grad)) if truth is None else truth
        error = (in_double(grad) - truth).norm() / max(truth.norm().item(), 1e-3 * whole)
        if not error.isfinite():
            return float("inf")
        worst = max(worst, error.item())
    return worst


def verified(
    build: Callable[[nn.Module, Sequence[Tensor]], Step],
    model: nn.Module,
    tasks: Sequence[Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    double: bool,
) -> tuple[float, Step]:
    """Verifies what `build(model, tasks)` returns, on a copy of the model, in float64 or in the dtype of the model.

    A step that computes outside torch has a method `copy_gradient`, which copies its gradient to the parameters.

    Returns:
        The relative error, and the step.

    Raises:
        WrongGradient: the error exceeds the tolerance.
    """
    own = copy.deepcopy(model)
    if double:
        own = own._apply(in_double)
        tasks = pytrees.mapped(in_double, tasks)
    step = build(own, tasks)
    step()
    getattr(step, "copy_gradient", lambda: None)()
    error = relative_error(own, expected)
    if error > tolerance:
        dtype = torch.float64 if double else next(own.parameters()).dtype
        raise WrongGradient(f"{dtype} meta-gradient must be within {tolerance:g} of the reference, got {error:.1e}")
    return error, step

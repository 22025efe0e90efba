"""Verification: compares a meta-gradient with the float64 reference, on the inputs that are timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maml_cuda.reference import meta_gradient

from .meta_steps import Builder, Step
from .workloads import Tasks, Workload

FLOAT64_TOLERANCE = 1e-10


class WrongGradient(Exception):
    """A meta-gradient differs from the reference."""


def reference_gradient(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> dict[str, Tensor]:
    """The float64 meta-gradient of maml_cuda.reference (plain autograd), by parameter name."""
    _, grads = meta_gradient(
        copy.deepcopy(model).double(),
        workload.loss,
        *tasks.double(),
        workload.inner_lr,
        workload.inner_steps,
        first_order=first_order,
        inner_optimizer=workload.inner_optimizer,
        inner_clip_norm=workload.inner_clip_norm,
    )
    return grads


def relative_error(model: nn.Module, expected: Mapping[str, Tensor]) -> float:
    """The maximum over parameters of `|grad - expected| / max(|expected|, 1e-3 |all gradients|)`.

    The lower bound is for gradients that are exactly zero, such as that of a bias before BatchNorm, where only rounding
    noise is left. NaN and a missing gradient give infinity.
    """
    whole = torch.stack([g.norm() for g in expected.values()]).norm().item()
    worst = 0.0
    for name, p in model.named_parameters():
        if p.grad is None:
            return float("inf")
        error = (p.grad.double() - expected[name]).norm() / max(expected[name].norm().item(), 1e-3 * whole)
        if not error.isfinite():
            return float("inf")
        worst = max(worst, error.item())
    return worst


def verify(
    build: Builder,
    workload: Workload,
    model: nn.Module,
    tasks: Tasks,
    first_order: bool,
    expected: Mapping[str, Tensor],
) -> tuple[float, float, Step]:
    """Verifies an implementation in float64 and float32. Returns both relative errors and the float32 step.

    A step that computes outside torch has a method `copy_gradient`, which copies its gradient to the parameters.

    Raises:
        WrongGradient: an error exceeds FLOAT64_TOLERANCE or the workload's `float32_tolerance`.
    """
    errors: list[float] = []
    for dtype, tolerance in ((torch.float64, FLOAT64_TOLERANCE), (torch.float32, workload.float32_tolerance)):
        own = copy.deepcopy(model).to(dtype)
        step = build(workload, own, tasks.double() if dtype == torch.float64 else tasks, first_order)
        step()
        getattr(step, "copy_gradient", lambda: None)()
        error = relative_error(own, expected)
        if error > tolerance:
            raise WrongGradient(f"{dtype} meta-gradient must be within {tolerance:g} of the reference, got {error:.1e}")
        errors.append(error)
    return errors[0], errors[1], step

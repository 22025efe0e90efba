"""Prove before timing: a side's meta-gradient against the float64 reference, on the inputs that are timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maml_cuda.reference import meta_gradient

from .rivals import Builder, Step
from .workloads import Tasks, Workload

FLOAT64_LIMIT = 1e-10


class WrongAnswer(Exception):
    """A side's meta-gradient is not the reference's."""


def truth(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> dict[str, Tensor]:
    """The float64 meta-gradient by plain autograd, by parameter name."""
    _, grads = meta_gradient(
        copy.deepcopy(model).double(),
        workload.loss,
        *tasks.double(),
        workload.inner_lr,
        workload.inner_steps,
        first_order=first_order,
    )
    return grads


def relative_error(model: nn.Module, expected: Mapping[str, Tensor]) -> float:
    """The worst parameter's `|grad - expected| / |expected|`; NaN and a missing gradient count as infinite.

    Norms below a thousandth of the whole gradient's are raised to that: a bias before BatchNorm has gradient
    zero, and its rounding noise has no scale of its own.
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


def prove(
    build: Builder,
    workload: Workload,
    model: nn.Module,
    tasks: Tasks,
    first_order: bool,
    expected: Mapping[str, Tensor],
) -> tuple[float, float, Step]:
    """A side's relative errors in float64 and in float32, and its float32 step; raises WrongAnswer past either limit.

    A step whose gradient is not torch's has a `copy_gradient`, which leaves it in the parameters.
    """
    errors: list[float] = []
    for dtype, limit in ((torch.float64, FLOAT64_LIMIT), (torch.float32, workload.float32_limit)):
        own = copy.deepcopy(model).to(dtype)
        step = build(workload, own, tasks.double() if dtype == torch.float64 else tasks, first_order)
        step()
        getattr(step, "copy_gradient", lambda: None)()
        error = relative_error(own, expected)
        if error > limit:
            raise WrongAnswer(f"{dtype} meta-gradient must be within {limit:g} of the reference, got {error:.1e}")
        errors.append(error)
    return errors[0], errors[1], step

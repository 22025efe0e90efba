"""Verification of a workload: compares a meta-gradient with the float64 reference, on the inputs that are timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from maml_cuda.benchmark.baselines import Step
from maml_cuda.benchmark.verification import FLOAT64_TOLERANCE, verified
from maml_cuda.reference import meta_gradient

from .meta_steps import Builder
from .workloads import Tasks, Workload


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


def verify(
    build: Builder,
    workload: Workload,
    model: nn.Module,
    tasks: Tasks,
    first_order: bool,
    expected: Mapping[str, Tensor],
) -> tuple[float, float, Step]:
    """Verifies an implementation in float64 and float32. Returns both relative errors and the float32 step.

    Raises:
        WrongGradient: an error exceeds FLOAT64_TOLERANCE or the workload's `float32_tolerance`.
    """

    def started(own: nn.Module, data: Tasks) -> Step:
        return build(workload, own, data, first_order)

    float64, _ = verified(started, model, tasks, expected, FLOAT64_TOLERANCE, double=True)
    float32, step = verified(started, model, tasks, expected, workload.float32_tolerance, double=False)
    return float64, float32, step

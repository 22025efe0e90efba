"""Verification on a GPU: in float64 against the reference, and in each precision on a smooth variant of the model.

Two correct float32 computations may decide a ReLU or a maximum differently, which changes the meta-gradient of a deep
network by per cents. So the model itself cannot distinguish a wrong kernel from such a decision. The smooth variant has
SiLU for ReLU and a mean for each maximum. The float32 tolerance on it follows from the reference's own float32 error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from maml_cuda.benchmark.verification import FLOAT64_TOLERANCE, WrongGradient, relative_error
from maml_cuda.reference import meta_gradient

from ..meta_steps import Builder
from ..verification import reference_gradient
from ..worker import describe_error
from ..workloads import Tasks, Workload
from .implementations import fused

BASELINE_LIMIT = 1e-3  # float32 tolerance of a baseline, which only a wrong formula exceeds
SLACK = 2e-6  # the float32 tolerance is twice the error of the float32 reference plus this
SMOOTH_LIMITS = {"bf16x3": 3e-3, "tf32": 5e-2, "bfloat16": 0.5}  # which only a wrong kernel exceeds
END_TO_END_LIMITS = {
    "float32": 0.0,
    "bf16x3": 1e-2,
    "tf32": 0.75,
    "bfloat16": 0.95,
}  # or the tolerance of the workload, if larger

SMOOTH_FUNCTIONS = {F.relu: F.silu, F.leaky_relu: F.silu, torch.relu: F.silu, F.max_pool2d: F.avg_pool2d}
ARGUMENTS = {F.silu: 1, F.avg_pool2d: 2}  # number of arguments to keep


def smooth(model: nn.Module) -> nn.Module:
    """A copy of the model with only smooth functions. Parameters keep their names."""
    graph = fx.symbolic_trace(copy.deepcopy(model))
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in SMOOTH_FUNCTIONS:
            node.target = SMOOTH_FUNCTIONS[node.target]
            node.args, node.kwargs = node.args[: ARGUMENTS[node.target]], {}
    for name, module in list(graph.named_modules()):
        if isinstance(module, nn.ReLU):
            graph.set_submodule(name, nn.SiLU())
    graph.recompile()
    # A plain module, because maml_cuda cannot trace the __call__ of a GraphModule.
    variant = type("SmoothVariant", (nn.Module,), {"forward": type(graph).forward})()
    for name, child in graph.named_children():
        variant.add_module(name, child)
    return variant


def distance(grads: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> float:
    """|grads - expected| / |expected| over all parameters together; infinite if one is missing or not finite.

    Not per parameter, because some gradients are exactly zero, such as that of a bias before BatchNorm.
    """
    if any(grads[name] is None for name in expected):
        return float("inf")
    off = torch.stack([(grads[name].double() - e).norm() for name, e in expected.items()]).norm()
    error = (off / torch.stack([e.norm() for e in expected.values()]).norm()).item()
    return error if math.isfinite(error) else float("inf")


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def verify_float64(
    workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, expected: dict[str, Tensor]
) -> float:
    """The relative error of maml_cuda in float64, the maximum over parameters; WrongGradient if too large."""
    own = copy.deepcopy(model).double()
    fused("float32", False)(workload, own, tasks.double(), first_order)()
    error = relative_error(own, expected)
    if not error <= FLOAT64_TOLERANCE:
        raise WrongGradient(f"float64 must be within {FLOAT64_TOLERANCE:g} of the reference, got {error:.1e}")
    return error


def smooth_errors(
    workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, builders: Mapping[str, Builder]
) -> Iterator[tuple[str, float | None, str]]:
    """Errors against float64 on the smooth variant: ("reference", error, ""), then (name, error, reason) per builder.

    The reason says why the error is too large; "" if it is not. maml_cuda is named by precision, a baseline by its
    name.
    """
    variant = smooth(model)
    expected = reference_gradient(workload, variant, tasks, first_order)
    _, plain = meta_gradient(
        copy.deepcopy(variant), workload.loss, *tasks, workload.inner_lr, workload.inner_steps, first_order=first_order
    )
    reference = distance(plain, expected)
    yield "reference", reference, ""
    limits = {"float32": 2 * reference + SLACK, **SMOOTH_LIMITS}
    for name, build in builders.items():
        own = copy.deepcopy(variant)
        try:
            build(workload, own, tasks, first_order)()
        except Exception as error:  # a failure must not affect the others
            yield name, None, describe_error(error)
            continue
        error = distance(gradients(own), expected)
        most = limits.get(name, BASELINE_LIMIT)
        reason = f"{name} on the smooth variant must be within {most:.1e} of float64, got {error:.1e}"
        yield name, error if math.isfinite(error) else None, "" if error <= most else reason


def end_to_end(
    workload: Workload, model: nn.Module, precision: str, expected: Mapping[str, Tensor]
) -> tuple[float | None, str]:
    """The error of the gradient in `model` (None: not finite), and the reason if it is too large."""
    error = distance(gradients(model), expected)
    most = max(workload.float32_tolerance, END_TO_END_LIMITS[precision])
    reason = f"the {precision} meta-gradient must be within {most:g} of float64, got {error:.1e}"
    return error if math.isfinite(error) else None, "" if error <= most else reason

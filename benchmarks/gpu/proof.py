"""Is the answer right: float64 against the reference, and float32 and below on a smooth twin of the net.

One ReLU or argmax that flips between two correct float32 computations moves a deep net's meta-gradient by per cents, so
the net itself cannot tell a wrong kernel from a flip. Its twin has SiLU for every ReLU and a mean for every maximum; on
it the reference's own float32 error says how near float32 can come.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from maml_cuda.reference import meta_gradient

from ..proof import FLOAT64_LIMIT, WrongAnswer, relative_error, truth
from ..rivals import Builder
from ..worker import words
from ..workloads import Tasks, Workload
from .sides import ours

RIVAL_LIMIT = 1e-3  # of a rival in float32: only a wrong formula exceeds it
SLACK = 2e-6  # of float32, beyond twice the reference's own error
SMOOTH_LIMITS = {"bf16x3": 3e-3, "tf32": 5e-2, "bfloat16": 0.5}  # only a wrong kernel exceeds them
END_TO_END_LIMITS = {"float32": 0.0, "bf16x3": 1e-2, "tf32": 0.75, "bfloat16": 0.95}  # or the workload's own if larger

SMOOTH_FUNCTIONS = {F.relu: F.silu, F.leaky_relu: F.silu, torch.relu: F.silu, F.max_pool2d: F.avg_pool2d}
ARGUMENTS = {F.silu: 1, F.avg_pool2d: 2}  # those that both functions have


def smooth(model: nn.Module) -> nn.Module:
    """A copy of the model in which nothing has a kink; parameters keep their names."""
    graph = fx.symbolic_trace(copy.deepcopy(model))
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in SMOOTH_FUNCTIONS:
            node.target = SMOOTH_FUNCTIONS[node.target]
            node.args, node.kwargs = node.args[: ARGUMENTS[node.target]], {}
    for name, module in list(graph.named_modules()):
        if isinstance(module, nn.ReLU):
            graph.set_submodule(name, nn.SiLU())
    graph.recompile()
    # A GraphModule has a __call__ of its own, behind which no plan can look.
    twin = type("SmoothTwin", (nn.Module,), {"forward": type(graph).forward})()
    for name, child in graph.named_children():
        twin.add_module(name, child)
    return twin


def distance(grads: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> float:
    """|grads - expected| / |expected| over all parameters at once; infinite where one is missing or not finite.

    Not parameter by parameter: a bias before BatchNorm has gradient zero, and its noise no scale of its own.
    """
    if any(grads[name] is None for name in expected):
        return float("inf")
    off = torch.stack([(grads[name].double() - e).norm() for name, e in expected.items()]).norm()
    error = (off / torch.stack([e.norm() for e in expected.values()]).norm()).item()
    return error if math.isfinite(error) else float("inf")


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def prove_float64(
    workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, expected: dict[str, Tensor]
) -> float:
    """Our relative error in float64, of the worst parameter; raises WrongAnswer past the limit."""
    own = copy.deepcopy(model).double()
    ours("float32", False)(workload, own, tasks.double(), first_order)()
    error = relative_error(own, expected)
    if not error <= FLOAT64_LIMIT:
        raise WrongAnswer(f"float64 must be within {FLOAT64_LIMIT:g} of the reference, got {error:.1e}")
    return error


def smooth_errors(
    workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, builders: Mapping[str, Builder]
) -> Iterator[tuple[str, float | None, str]]:
    """On the smooth twin, against float64: ("reference", error, ""), then each builder's with why it is refused.

    Ours are named by their precision, the rivals by their name.
    """
    twin = smooth(model)
    expected = truth(workload, twin, tasks, first_order)
    _, plain = meta_gradient(
        copy.deepcopy(twin), workload.loss, *tasks, workload.inner_lr, workload.inner_steps, first_order=first_order
    )
    reference = distance(plain, expected)
    yield "reference", reference, ""
    limits = {"float32": 2 * reference + SLACK, **SMOOTH_LIMITS}
    for name, build in builders.items():
        own = copy.deepcopy(twin)
        try:
            build(workload, own, tasks, first_order)()
        except Exception as error:  # the others may still serve
            yield name, None, words(error)
            continue
        error = distance(gradients(own), expected)
        most = limits.get(name, RIVAL_LIMIT)
        why = f"{name} on the smooth twin must be within {most:.1e} of float64, got {error:.1e}"
        yield name, error if math.isfinite(error) else None, "" if error <= most else why


def end_to_end(
    workload: Workload, model: nn.Module, precision: str, expected: Mapping[str, Tensor]
) -> tuple[float | None, str]:
    """The error of the gradient that a side has left in the model (None: not finite), and why it is wrong, if it is."""
    error = distance(gradients(model), expected)
    most = max(workload.float32_limit, END_TO_END_LIMITS[precision])
    why = f"the {precision} meta-gradient must be within {most:g} of float64, got {error:.1e}"
    return error if math.isfinite(error) else None, "" if error <= most else why

"""Implementations of the meta-step on a GPU: maml_cuda in each precision, and the baselines. Each has forms:

called     called from Python
graphs     called from Python, with the CUDA graphs of FusedMAML
captured   the whole meta-step in a CUDA graph captured by the caller; small steps several times per graph
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from maml_cuda import FusedMAML
from maml_cuda.benchmark.baselines import Step, autograd_loop, clear, func_vmap

from ..meta_steps import Builder
from ..workloads import Tasks, Workload
from . import jax_meta_step
from .machine import Machine

MAML_CUDA = "maml_cuda"
PRECISIONS = ("float32", "bf16x3", "tf32", "bfloat16")
MOST_STEPS_TO_CAPTURE = 200  # inner steps times tasks; each is about 100 graph nodes of the autograd loop
SMALL_FLOPS = 1e9  # below it, a meta-step takes less time than the launch of a graph


@dataclass(frozen=True)
class Implementation:
    """A method in one precision and form."""

    method: str  # MAML_CUDA or the name of a baseline
    precision: str
    form: str
    build: Builder
    copies: int = 1  # meta-steps per call of the built step
    runs: int = 1  # calls before the gradient is verified
    seconds: float | None = None  # time limit to build and run it

    @property
    def name(self) -> str:
        return f"{self.method} {self.precision} {self.form}"

    @property
    def is_fused(self) -> bool:
        return self.method == MAML_CUDA

    def set_precision(self) -> None:
        """Sets torch's global TF32 flags; call it before each block of steps."""
        allow_tf32(self.precision == "tf32")


def allow_tf32(allow: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def fused(precision: str, cuda_graphs: bool) -> Builder:
    """`maml.backward`, with or without CUDA graphs."""

    def build(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
        maml = FusedMAML(
            model, workload.inner_lr, workload.inner_steps, loss=workload.loss, first_order=first_order,
            backend="fused", precision=precision, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        parameters = list(model.parameters())

        def step() -> None:
            clear(parameters)
            maml.backward(*tasks)

        return step

    return build


def captured(device: Machine, build: Builder, copies: int = 1) -> Builder:
    """The replay of a CUDA graph of `copies` steps."""

    def build_captured(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
        return device.capture(build(workload, model, tasks, first_order), copies)

    return build_captured


def compiled(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """torch.compile of the whole meta-step of torch.func, with CUDA graphs."""
    torch._dynamo.reset()
    return torch.compile(func_vmap(workload, model, tasks, first_order), mode="reduce-overhead")


def copies_of(flops: int) -> int:
    """Meta-steps per captured graph."""
    return 8 if flops < SMALL_FLOPS else 1


def fused_implementations(device: Machine, precision: str, copies: int) -> list[Implementation]:
    """maml_cuda in every form, the fastest first."""
    found = []
    if device.has_graphs:
        found.append(
            Implementation(MAML_CUDA, precision, "captured", captured(device, fused(precision, False), copies), copies)
        )
    return [
        *found,
        Implementation(MAML_CUDA, precision, "graphs", fused(precision, True), runs=3),  # the second call captures
        Implementation(MAML_CUDA, precision, "called", fused(precision, False)),
    ]


def baseline_implementations(
    device: Machine, method: str, precision: str, workload: Workload, copies: int, seconds: float | None
) -> list[Implementation]:
    """A baseline in its forms. `seconds`: time limit if it is compiled."""
    if method == "JAX jit":
        return [Implementation(method, precision, "called", jax_meta_step.builder(precision), seconds=seconds)]
    if method == "torch.compile":
        return [Implementation(method, precision, "called", compiled, runs=3, seconds=seconds)]
    build = func_vmap if method == "torch.func vmap" else autograd_loop
    found = [Implementation(method, precision, "called", build)]
    small = workload.tasks * workload.inner_steps <= MOST_STEPS_TO_CAPTURE
    if device.has_graphs and method == "torch.func vmap":
        found.append(Implementation(method, precision, "captured", captured(device, build, copies), copies))
    elif device.has_graphs and small:
        found.append(Implementation(method, precision, "captured", captured(device, build)))
    return found

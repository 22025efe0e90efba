"""Who computes the meta-step: we in each precision and form, and the rivals on the same GPU.

Forms: "called" from Python; "graphs", as called with FusedMAML's own CUDA graphs; "captured", the whole step with its
backward in a CUDA graph of the caller's, several steps in one graph where they are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from maml_cuda import FusedMAML

from ..rivals import Builder, Step, autograd_loop, clear, func_vmap
from ..workloads import Tasks, Workload
from . import jax_rival
from .machine import Machine

OURS = "maml_cuda"
PRECISIONS = ("float32", "bf16x3", "tf32", "bfloat16")
MOST_STEPS_TO_CAPTURE = 200  # inner steps of all tasks; each is some hundred nodes of the autograd loop's graph
SMALL_FLOPS = 1e9  # below it a step is shorter than what a graph costs to launch


@dataclass(frozen=True)
class Side:
    """One way to compute the step; `build` gives a step that computes it `copies` times."""

    who: str
    precision: str
    form: str
    build: Builder
    copies: int = 1
    runs: int = 1  # before its answer is looked at
    seconds: float | None = None  # that building it and running it may take

    @property
    def name(self) -> str:
        return f"{self.who} {self.precision} {self.form}"

    @property
    def is_ours(self) -> bool:
        return self.who == OURS

    def enter(self) -> None:
        """What it needs of the process, before each block of steps."""
        allow_tf32(self.precision == "tf32")


def allow_tf32(allow: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def ours(precision: str, cuda_graphs: bool) -> Builder:
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


def captured(on: Machine, build: Builder, copies: int = 1) -> Builder:
    def build_captured(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
        return on.capture(build(workload, model, tasks, first_order), copies)

    return build_captured


def compiled(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    """torch.compile around all of torch.func's step, its CUDA graphs included."""
    torch._dynamo.reset()
    return torch.compile(func_vmap(workload, model, tasks, first_order), mode="reduce-overhead")


def copies_of(flops: int) -> int:
    return 8 if flops < SMALL_FLOPS else 1


def our_sides(on: Machine, precision: str, copies: int) -> list[Side]:
    """We in every form, the fastest first."""
    found = []
    if on.has_graphs:
        found.append(Side(OURS, precision, "captured", captured(on, ours(precision, False), copies), copies))
    return [
        *found,
        Side(OURS, precision, "graphs", ours(precision, True), runs=3),  # the second call captures
        Side(OURS, precision, "called", ours(precision, False)),
    ]


def rival_sides(
    on: Machine, who: str, precision: str, workload: Workload, copies: int, seconds: float | None
) -> list[Side]:
    """A rival in its forms; `seconds`: for building it where it is compiled."""
    if who == "JAX jit":
        return [Side(who, precision, "called", jax_rival.builder(precision), seconds=seconds)]
    if who == "torch.compile":
        return [Side(who, precision, "called", compiled, runs=3, seconds=seconds)]
    build = func_vmap if who == "torch.func vmap" else autograd_loop
    found = [Side(who, precision, "called", build)]
    small = workload.tasks * workload.inner_steps <= MOST_STEPS_TO_CAPTURE
    if on.has_graphs and who == "torch.func vmap":
        found.append(Side(who, precision, "captured", captured(on, build, copies), copies))
    elif on.has_graphs and small:
        found.append(Side(who, precision, "captured", captured(on, build)))
    return found

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

    @property
    def proven_as(self) -> str:
        """Ours by precision, for each has kernels of its own; a rival is one formula."""
        return self.precision if self.is_ours else self.who

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
    found = [
        Side(OURS, precision, "called", ours(precision, False)),
        Side(OURS, precision, "graphs", ours(precision, True), runs=3),  # the second call captures
    ]
    if on.has_graphs:
        found.append(Side(OURS, precision, "captured", captured(on, ours(precision, False), copies), copies))
    return found


def sides(on: Machine, workload: Workload, flops: int) -> list[Side]:
    """We in every precision and form, and the rivals that need no compilation."""
    copies = copies_of(flops)
    found = []
    for precision in PRECISIONS:
        found += our_sides(on, precision, copies)
    for precision in ("float32", "tf32") if on.has_graphs else ("float32",):
        found.append(Side("autograd loop", precision, "called", autograd_loop))
        found.append(Side("torch.func vmap", precision, "called", func_vmap))
        if on.has_graphs:
            found.append(Side("torch.func vmap", precision, "captured", captured(on, func_vmap, copies), copies))
            if workload.tasks * workload.inner_steps <= MOST_STEPS_TO_CAPTURE:
                found.append(Side("autograd loop", precision, "captured", captured(on, autograd_loop)))
    return found


def compiled_sides(on: Machine, workload: Workload, flops: int, seconds: float) -> list[Side]:
    """The rivals that must be compiled, each within so many seconds, and we beside them; in one precision, for the time
    that compiling takes: float32 for nets of Linear layers, tf32 for convolutions."""
    precision = "float32" if workload.loss == "mse" else "tf32"
    return [
        *our_sides(on, precision, copies_of(flops)),
        Side("JAX jit", precision, "called", jax_rival.builder(precision), seconds=seconds),
        Side("torch.compile", precision, "called", compiled, runs=3, seconds=seconds),
    ]

"""The job that measures maml_cuda on one case, in each precision and form: timing first, then verification.

It yields the shapes of the case; then `implementations` by name, with the status "timed" (times of a meta-step in ms,
peak memory) or "failed", "stopped" or "slow" (with the reason); then `float64` and `smooth` (errors on the smooth
variant), and the `error` of each implementation. If the verification fails, `unverified` has the reason, and the times
are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maml_cuda.benchmark.verification import WrongGradient
from maml_cuda.engine import meta_step
from maml_cuda.engine.problem import problem_of

from ..flops import meta_step_flops
from ..verification import reference_gradient
from ..worker import describe_error
from ..workloads import Tasks, Workload
from .cases import Case
from .facts import raise_if_lost
from .implementations import PRECISIONS, allow_tf32, copies_of, fused, fused_implementations
from .machine import Machine, machine
from .timing import Candidate, Piece, interleave, medians, on_device, prepare, release, shape
from .verification import end_to_end, smooth_errors, verify_float64


def measure(case: Case, seconds: float) -> Iterator[Piece]:
    """`seconds`: how long each implementation is timed."""
    device, workload, first_order = machine(case.emulated), case.workload(), case.order == 1
    model, tasks = on_device(workload, device)
    flops = meta_step_flops(workload, model, tasks, first_order)
    yield {**shape(case, workload, flops), "executor": executor(workload, model, tasks, first_order)}
    started: list[Candidate] = []
    for precision in PRECISIONS:
        together = []
        for implementation in fused_implementations(device, precision, copies_of(flops)):
            candidate, found = prepare(device, implementation, workload, model, tasks, first_order)
            said = {} if candidate else {"say": f"{case}: {implementation.name} {found['status']}: {found['reason']}"}
            yield {"implementations": {implementation.name: found}, **said}
            together += [candidate] if candidate else []
        interleave(device, together, seconds)
        yield {
            "implementations": {c.implementation.name: c.summary() for c in together},
            "say": f"{case}: {medians(together)}",
        }
        started += together
    yield from verify(device, workload, model, tasks, first_order, started)
    del started, together
    release(device)


def verify(
    device: Machine, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, started: list[Candidate]
) -> Iterator[Piece]:
    """Yields the errors of the timed implementations, and why those that are wrong are unverified."""
    allow_tf32(False)
    reasons: dict[str, str] = {}  # by precision
    expected = reference_gradient(workload, model, tasks, first_order)
    try:
        yield {"float64": {"error": verify_float64(workload, model, tasks, first_order, expected)}}
    except Exception as problem:  # an error of any kind is a result of the verification
        raise_if_lost(device, problem)
        text = str(problem) if isinstance(problem, WrongGradient) else f"float64 failed: {describe_error(problem)}"
        reasons = dict.fromkeys(PRECISIONS, text)
        yield {"float64": {"failed": text}, "say": text}
    builders = {precision: fused(precision, False) for precision in PRECISIONS}
    for precision, distance, text in smooth_errors(workload, model, tasks, first_order, builders):
        device.synchronize()
        yield {"smooth": {precision: distance}, **({"say": text} if text else {})}
        if text:
            reasons.setdefault(precision, text)
    for candidate in started:
        implementation = candidate.implementation
        found = verdict(workload, candidate, expected, reasons.get(implementation.precision))
        yield {"implementations": {implementation.name: found}}


def verdict(workload: Workload, candidate: Candidate, expected: dict[str, torch.Tensor], reason: str | None) -> Piece:
    """The error of the gradient that the timed step has computed, and why it is unverified, if it is."""
    error, text = end_to_end(workload, candidate.model, candidate.implementation.precision, expected)
    unverified = reason or text
    return {"error": error, **({"unverified": unverified} if unverified else {})}


def executor(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> str:
    """The executor of the case: "megakernel" or "batched"."""
    from maml_cuda import FusedMAML

    maml = FusedMAML(model, workload.inner_lr, workload.inner_steps, loss=workload.loss, backend="fused")
    x = tasks.x_spt
    sample, double = tuple(x.shape[2:]), x.dtype == torch.float64
    key: tuple[Any, ...] = (sample, workload.support, workload.query, workload.inner_steps, first_order, double)
    program = meta_step.program_of(maml, x, tasks.x_qry)
    assert program is not None
    return problem_of(program.text, "meta_gradient", *key).runner(x.device).executor

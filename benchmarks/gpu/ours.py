"""One case, a job: we in each precision and form, timed first and proven after, each piece written when it is there.

Pieces: the case's shape; `sides` by name, status "timed" with times in ms of one meta-step and peak memory, or
"failed", "stopped", "slow" with the reason in words; then `float64`, `smooth` (errors on the smooth twin), and of each
side the `error` of its gradient. A side whose proof fails keeps its times and says why under `unproven`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maml_cuda.engine.problem import problem_of

from ..flops import meta_step_flops
from ..proof import WrongAnswer, truth
from ..worker import words
from ..workloads import Tasks, Workload
from .cases import Case
from .entrants import Entrant, Piece, enter, interleave, medians, moved, release, shape
from .facts import check
from .machine import Machine, machine
from .proof import end_to_end, prove_float64, smooth_errors
from .sides import PRECISIONS, allow_tf32, copies_of, our_sides, ours


def measure(case: Case, seconds: float) -> Iterator[Piece]:
    """`seconds` timed of each side."""
    on, workload, first_order = machine(case.emulated), case.workload(), case.order == 1
    model, tasks = moved(workload, on)
    flops = meta_step_flops(workload, model, tasks, first_order)
    yield {**shape(case, workload, flops), "executor": executor(workload, model, tasks, first_order)}
    started: list[Entrant] = []
    for precision in PRECISIONS:
        together = []
        for side in our_sides(on, precision, copies_of(flops)):
            entrant, found = enter(on, side, workload, model, tasks, first_order)
            said = {} if entrant else {"say": f"{case}: {side.name} {found['status']}: {found['reason']}"}
            yield {"sides": {side.name: found}, **said}
            together += [entrant] if entrant else []
        interleave(on, together, seconds)
        yield {"sides": {e.side.name: e.summary() for e in together}, "say": f"{case}: {medians(together)}"}
        started += together
    yield from prove(on, workload, model, tasks, first_order, started)
    del started, together
    release(on)


def prove(
    on: Machine, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, started: list[Entrant]
) -> Iterator[Piece]:
    """Errors of what was timed, and of each side that is not right, why."""
    allow_tf32(False)
    why: dict[str, str] = {}  # by precision
    expected = truth(workload, model, tasks, first_order)
    try:
        yield {"float64": {"error": prove_float64(workload, model, tasks, first_order, expected)}}
    except Exception as problem:  # of whatever kind: it is the result of the proof
        check(on, problem)
        text = str(problem) if isinstance(problem, WrongAnswer) else f"float64 failed: {words(problem)}"
        why = dict.fromkeys(PRECISIONS, text)
        yield {"float64": {"refused": text}, "say": text}
    builders = {precision: ours(precision, False) for precision in PRECISIONS}
    for precision, distance, text in smooth_errors(workload, model, tasks, first_order, builders):
        on.synchronize()
        yield {"smooth": {precision: distance}, **({"say": text} if text else {})}
        if text:
            why.setdefault(precision, text)
    for entrant in started:
        yield {"sides": {entrant.side.name: verdict(workload, entrant, expected, why.get(entrant.side.precision))}}


def verdict(workload: Workload, entrant: Entrant, expected: dict[str, torch.Tensor], why: str | None) -> Piece:
    """The error of the gradient that the very form that was timed has left, and why it is not proven, if it is not."""
    error, text = end_to_end(workload, entrant.model, entrant.side.precision, expected)
    unproven = why or text
    return {"error": error, **({"unproven": unproven} if unproven else {})}


def executor(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> str:
    """Which of the two serves the case: "megakernel" or "batched"."""
    from maml_cuda import FusedMAML

    maml = FusedMAML(model, workload.inner_lr, workload.inner_steps, loss=workload.loss, backend="fused")
    x = tasks.x_spt
    sample, double = tuple(x.shape[2:]), x.dtype == torch.float64
    key: tuple[Any, ...] = (sample, workload.support, workload.query, workload.inner_steps, first_order, double)
    return problem_of(maml._binding().text, "meta_gradient", *key).runner(x.device).executor

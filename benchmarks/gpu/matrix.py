"""One case, a job: prove every answer, then time those that are right, all sides in every round.

Pieces: the case's shape, `float64`, `smooth` (errors on the smooth twin), `sides` by name: status "timed" with times in
ms of one meta-step, error and peak memory, or "refused", "wrong", "failed", "slow" with the reason in words.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import problems

from ..flops import meta_step_flops
from ..proof import WrongAnswer, truth
from ..rivals import Step
from ..worker import OutOfTime, limit, words
from ..workloads import Tasks, Workload
from .cases import Case
from .facts import check
from .jax_rival import JaxStep
from .machine import Machine, machine
from .proof import end_to_end, prove_float64, smooth_errors
from .sides import OURS, Side, allow_tf32, compiled_sides, sides

Piece = dict[str, Any]
ROUNDS = 5
BURST = 2e-3  # seconds at least between two events, whose own resolution is half a microsecond
SLOW = 1.0  # seconds: a step as slow as this is no rival, and would take the others' time


def measure(case: Case, seconds: float, compile_seconds: float | None = None) -> Iterator[Piece]:
    """`seconds` timed of each side; with compile_seconds the rivals that must be compiled, in place of the others."""
    on = machine(case.emulated)
    workload, first_order = case.workload(), case.order == 1
    model, tasks = workload.build()
    flops = meta_step_flops(workload, model, tasks, first_order)
    model, tasks = model.to(on.torch_device), Tasks(*(x.to(on.torch_device) for x in tasks))
    yield {
        "workload": case.name, "order": case.order, "tasks": workload.tasks, "inner_steps": workload.inner_steps,
        "support": workload.support, "query": workload.query, "flops": flops, "compiled": compile_seconds is not None,
        "say": f"{case}: float64 reference",
    }  # fmt: skip
    if compile_seconds is None:
        entrants = sides(on, workload, flops)
    else:
        entrants = compiled_sides(on, workload, flops, compile_seconds)
    expected = truth(workload, model, tasks, first_order)
    refused = yield from prove(on, workload, model, tasks, first_order, expected, entrants)
    started: list[Entrant] = []
    torch.backends.cudnn.benchmark = True
    try:
        for side in entrants:
            piece = {"who": side.who, "precision": side.precision, "form": side.form}
            if side.proven_as in refused:
                yield {"sides": {side.name: {**piece, "status": "refused", "reason": refused[side.proven_as]}}}
                continue
            if side.seconds:
                yield {"say": f"{case}: {side.name}, at most {side.seconds:.0f} s"}
            entrant, found = enter(on, side, workload, model, tasks, first_order, expected)
            said = {} if entrant else {"say": f"{case}: {side.name} {found['status']}: {found['reason']}"}
            yield {"sides": {side.name: {**piece, **found}}, **said}
            if entrant:
                started.append(entrant)
        yield {"say": f"{case}: time {len(started)} sides"}
        interleave(on, started, seconds)
    finally:
        torch.backends.cudnn.benchmark = False
        allow_tf32(False)
    summaries = {entrant.side.name: entrant.summary() for entrant in started}
    yield {"sides": summaries, "say": f"{case}: {best(started)}"}


def prove(
    on: Machine, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool, expected: dict[str, Tensor],
    entrants: list[Side],
) -> Iterator[Piece]:  # fmt: skip
    """Returns what is refused, ours by precision and rivals by name, each with the reason."""
    builders = {side.proven_as: side.build for side in entrants if side.form == "called" and not side.seconds}
    refused: dict[str, str] = {}
    allow_tf32(False)
    try:
        error = prove_float64(workload, model, tasks, first_order, expected)
    except Exception as problem:  # of whatever kind: it is the result of the proof
        check(on, problem)
        why = str(problem) if isinstance(problem, WrongAnswer) else f"float64 failed: {words(problem)}"
        yield {"float64": {"refused": why}, "say": why}
        refused = {side.proven_as: why for side in entrants if side.is_ours}
        builders = {name: build for name, build in builders.items() if name not in refused}
    else:
        yield {"float64": {"error": error}, "executor": executor(workload, model, tasks, first_order)}
    for name, distance, why in smooth_errors(workload, model, tasks, first_order, builders):
        on.synchronize()
        yield {"smooth": {name: distance}, **({"say": why} if why else {})}
        if why:
            refused[name] = why
    return refused


@dataclass
class Entrant:
    """A side whose answer is right, ready to be timed."""

    side: Side
    step: Step
    count: int = 1  # calls between two events
    times: list[float] = field(default_factory=list)  # seconds of a meta-step
    slow: float | None = None

    def burst(self, on: Machine, count: int) -> float:
        if not isinstance(self.step, JaxStep):
            return on.burst(self.step, count)
        begin = perf_counter()  # its stream is not torch's, and no event of torch's would see it
        for _ in range(count):
            self.step()
        self.step.wait()
        return perf_counter() - begin

    def summary(self) -> Piece:
        if self.slow is not None:
            reason = f"a step took {self.slow:.2f} s, more than {SLOW:g} s: not timed"
            return {"status": "slow", "reason": reason, "seconds_once": self.slow}
        q1, median, q3 = (t * 1e3 for t in statistics.quantiles(self.times, n=4, method="inclusive"))
        return {"status": "timed", "ms": {"q1": q1, "median": median, "q3": q3}, "bursts": len(self.times)}


def enter(
    on: Machine, side: Side, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool,
    expected: dict[str, Tensor],
) -> tuple[Entrant | None, Piece]:  # fmt: skip
    """Builds a side, looks at its answer in the very form that is timed, and at its memory."""
    own = copy.deepcopy(model)

    def begin() -> Step:
        step = side.build(workload, own, tasks, first_order)
        for _ in range(side.runs):
            step()
        return step

    side.enter()
    started = perf_counter()
    try:
        with limit(side.seconds) if side.seconds else nullcontext():
            step, peak = on.peak(begin)
        if isinstance(step, JaxStep):
            step.copy_gradient()
            peak = step.peak()
        error = end_to_end(workload, own, side.precision, expected)
    except OutOfTime:
        return None, {"status": "failed", "reason": f"did not compile within {side.seconds:.0f} seconds"}
    except WrongAnswer as problem:
        return None, {"status": "wrong", "reason": str(problem)}
    except Exception as problem:  # a side's failure is a result and not the benchmark's end
        check(on, problem)
        return None, {"status": "failed", "reason": words(problem)}
    found = {"status": "proven", "error": error, "build_seconds": perf_counter() - started}
    return Entrant(side, step), {**found, "peak_bytes": peak, "peak_of": "build and first steps"}


def interleave(on: Machine, entrants: list[Entrant], seconds: float) -> None:
    """Fills in the times: all sides in every round, after a warm-up that also finds each one's burst."""
    gc.collect()
    gc.freeze()
    try:
        for entrant in entrants:
            entrant.side.enter()
            once = entrant.burst(on, 1)
            if once > SLOW:
                entrant.slow = once
                continue
            for _ in range(2):
                if once >= BURST:
                    break
                entrant.count = math.ceil(BURST / max(once, 1e-7))
                once = entrant.burst(on, entrant.count) / entrant.count
        for _ in range(ROUNDS):
            for entrant in entrants:
                if entrant.slow is None:
                    block(on, entrant, seconds / ROUNDS)
    finally:
        gc.unfreeze()


def block(on: Machine, entrant: Entrant, seconds: float) -> None:
    entrant.side.enter()
    per_burst = entrant.count * entrant.side.copies
    begin = perf_counter()
    while True:
        entrant.times.append(entrant.burst(on, entrant.count) / per_burst)
        if perf_counter() - begin >= seconds:
            return


def executor(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> str:
    """Which of the two serves the case: "megakernel" or "batched"."""
    from maml_cuda import FusedMAML

    maml = FusedMAML(model, workload.inner_lr, workload.inner_steps, loss=workload.loss, backend="fused")
    x = tasks.x_spt
    sample, double = tuple(x.shape[2:]), x.dtype == torch.float64
    shape = (sample, workload.support, workload.query, workload.inner_steps, first_order, double)
    return problems.problem_of(maml._binding().text, "meta_gradient", *shape).runner(x.device).executor


def best(started: list[Entrant]) -> str:
    """A line of what was just seen: our fastest and the fastest rival, whatever the precision."""
    timed = {e.side.name: e.summary()["ms"]["median"] for e in started if e.slow is None}
    groups = ([n for n in timed if n.startswith(OURS)], [n for n in timed if not n.startswith(OURS)])
    return "; ".join(f"{name} {timed[name]:.4g} ms" for name in (min(g, key=timed.get) for g in groups if g))

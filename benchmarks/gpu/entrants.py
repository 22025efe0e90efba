"""A side that takes part: built, looked at, and timed in turns with the others of its process."""

from __future__ import annotations

import copy
import gc
import math
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..rivals import Step
from ..worker import OutOfTime, limit, words
from ..workloads import Tasks, Workload
from .facts import check
from .jax_rival import JaxStep
from .machine import Machine
from .sides import Side

Piece = dict[str, Any]
ROUNDS = 5
BURST = 2e-3  # seconds at least between two events, whose own resolution is half a microsecond
SLOW = 1.0  # seconds: a step as slow as this would take the others' time


@dataclass
class Entrant:
    """A side ready to be timed; the model that it was built on holds its gradient."""

    side: Side
    step: Step
    model: nn.Module
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
    on: Machine, side: Side, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool
) -> tuple[Entrant | None, Piece]:
    """Builds a side and runs it, so that its gradient can be looked at; its memory, or in words why it failed."""
    own = copy.deepcopy(model)

    def begin() -> Step:
        step = side.build(workload, own, tasks, first_order)
        for _ in range(side.runs):
            step()
        return step

    side.enter()
    started = perf_counter()
    piece = {"who": side.who, "precision": side.precision, "form": side.form}
    try:
        with limit(side.seconds) if side.seconds else nullcontext():
            step, peak = on.peak(begin)
        if isinstance(step, JaxStep):
            step.copy_gradient()
            peak = step.peak()
    except OutOfTime:
        return None, {**piece, "status": "stopped", "reason": f"not built within {side.seconds:.0f} seconds"}
    except Exception as problem:  # a side's failure is a result and not the benchmark's end
        check(on, problem)
        return None, {**piece, "status": "failed", "reason": words(problem)}
    found = {"status": "built", "build_seconds": perf_counter() - started}
    return Entrant(side, step, own), {**piece, **found, "peak_bytes": peak, "peak_of": "build and first steps"}


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


def medians(entrants: list[Entrant]) -> str:
    """A line of what was just seen."""
    timed = [(e.side.name, statistics.median(e.times) * 1e3) for e in entrants if e.slow is None]
    return "; ".join(f"{name} {ms:.4g} ms" for name, ms in timed) or "none of the sides was timed"


def moved(workload: Workload, on: Machine) -> tuple[nn.Module, Tasks]:
    """The model and its meta-batch, on the device."""
    model, tasks = workload.build()
    return model.to(on.torch_device), Tasks(*(x.to(on.torch_device) for x in tasks))


def shape(case: Any, workload: Workload, flops: int) -> Piece:
    return {
        "workload": case.workload_name, "order": case.order, "tasks": workload.tasks,
        "inner_steps": workload.inner_steps, "support": workload.support, "query": workload.query, "flops": flops,
    }  # fmt: skip


def release(on: Machine) -> None:
    """What a case leaves behind must not slow the next one in this process."""
    gc.collect()
    if on.has_graphs:
        torch.cuda.empty_cache()

"""Prepares implementations, and times them in alternation with the others in the same process."""

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

from maml_cuda.benchmark.baselines import Step

from ..worker import TimeLimitExceeded, describe_error, time_limit
from ..workloads import Tasks, Workload
from .facts import raise_if_lost
from .implementations import Implementation
from .jax_meta_step import JaxStep
from .machine import Machine

Piece = dict[str, Any]
ROUNDS = 5
BURST = 2e-3  # minimum seconds between two events, whose resolution is 0.5 us
SLOW = 1.0  # steps that take more seconds are not timed


@dataclass
class Candidate:
    """An implementation that is ready to be timed. `model` holds its gradient."""

    implementation: Implementation
    step: Step
    model: nn.Module
    count: int = 1  # calls per burst
    times: list[float] = field(default_factory=list)  # seconds of a meta-step
    slow: float | None = None  # seconds of a step that is too slow

    def burst(self, device: Machine, count: int) -> float:
        """Seconds of `count` calls in a row."""
        if not isinstance(self.step, JaxStep):
            return device.burst(self.step, count)
        begin = perf_counter()  # JAX uses its own stream, where torch's events do not work
        for _ in range(count):
            self.step()
        self.step.wait()
        return perf_counter() - begin

    def summary(self) -> Piece:
        if self.slow is not None:
            reason = f"a step took {self.slow:.2f} s, more than {SLOW:g} s"
            return {"status": "slow", "reason": reason, "seconds_once": self.slow}
        q1, median, q3 = (t * 1e3 for t in statistics.quantiles(self.times, n=4, method="inclusive"))
        return {"status": "timed", "ms": {"q1": q1, "median": median, "q3": q3}, "bursts": len(self.times)}


def prepare(
    device: Machine,
    implementation: Implementation,
    workload: Workload,
    model: nn.Module,
    tasks: Tasks,
    first_order: bool,
) -> tuple[Candidate | None, Piece]:
    """Builds an implementation and runs it. Returns the candidate (None after a failure) and the result so far."""
    own = copy.deepcopy(model)

    def begin() -> Step:
        step = implementation.build(workload, own, tasks, first_order)
        for _ in range(implementation.runs):
            step()
        return step

    implementation.set_precision()
    started = perf_counter()
    piece = {"method": implementation.method, "precision": implementation.precision, "form": implementation.form}
    try:
        with time_limit(implementation.seconds) if implementation.seconds else nullcontext():
            step, peak = device.peak(begin)
        if isinstance(step, JaxStep):
            step.copy_gradient()
            peak = step.peak()
    except TimeLimitExceeded:
        return None, {**piece, "status": "stopped", "reason": f"not built within {implementation.seconds:.0f} seconds"}
    except Exception as problem:  # a failure is a result; the benchmark goes on
        raise_if_lost(device, problem)
        return None, {**piece, "status": "failed", "reason": describe_error(problem)}
    found = {"status": "built", "build_seconds": perf_counter() - started}
    return Candidate(implementation, step, own), {
        **piece,
        **found,
        "peak_bytes": peak,
        "peak_of": "build and first steps",
    }


def interleave(device: Machine, candidates: list[Candidate], seconds: float) -> None:
    """Times all candidates in every round, after a warm-up that sets the length of their bursts."""
    gc.collect()
    gc.freeze()
    try:
        for candidate in candidates:
            candidate.implementation.set_precision()
            once = candidate.burst(device, 1)
            if once > SLOW:
                candidate.slow = once
                continue
            for _ in range(2):
                if once >= BURST:
                    break
                candidate.count = math.ceil(BURST / max(once, 1e-7))
                once = candidate.burst(device, candidate.count) / candidate.count
        for _ in range(ROUNDS):
            for candidate in candidates:
                if candidate.slow is None:
                    block(device, candidate, seconds / ROUNDS)
    finally:
        gc.unfreeze()


def block(device: Machine, candidate: Candidate, seconds: float) -> None:
    """Times a candidate for the given seconds."""
    candidate.implementation.set_precision()
    per_burst = candidate.count * candidate.implementation.copies
    begin = perf_counter()
    while True:
        candidate.times.append(candidate.burst(device, candidate.count) / per_burst)
        if perf_counter() - begin >= seconds:
            return


def medians(candidates: list[Candidate]) -> str:
    """A progress message with the median times."""
    timed = [(c.implementation.name, statistics.median(c.times) * 1e3) for c in candidates if c.slow is None]
    return "; ".join(f"{name} {ms:.4g} ms" for name, ms in timed) or "no implementation was timed"


def on_device(workload: Workload, device: Machine) -> tuple[nn.Module, Tasks]:
    """The model and the meta-batch of a workload, on the device."""
    model, tasks = workload.build()
    return model.to(device.torch_device), Tasks(*(x.to(device.torch_device) for x in tasks))


def shape(case: Any, workload: Workload, flops: int) -> Piece:
    """The description of a case in the record."""
    return {
        "workload": case.workload_name, "order": case.order, "tasks": workload.tasks,
        "inner_steps": workload.inner_steps, "support": workload.support, "query": workload.query, "flops": flops,
    }  # fmt: skip


def release(device: Machine) -> None:
    """Frees memory, so that a case does not affect the next one in this process."""
    gc.collect()
    if device.has_graphs:
        torch.cuda.empty_cache()

"""Measures one case: verifies every implementation, times the correct ones, and summarises.

Each implementation has its own process, so that a crash or a hang affects no other and its memory can be measured. Only
one process runs at a time; timing alternates between them (maml_cuda/benchmark/timing.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from maml_cuda.benchmark.timing import Timing, interleave

from .flops import meta_step_flops
from .implementations import MAML_CUDA
from .meta_steps import Builder
from .sgemm import SGEMM_FLOPS
from .verification import reference_gradient
from .worker import Failed, SeparateProcess, TimedOut
from .workloads import Workload

Result = dict[str, Any]
SGEMM = "sgemm"
GRACE = 60.0  # a timed block may take this many seconds more than ten times its expected duration
WARM_UP = 0.1  # as a fraction of the timed seconds


def measure(
    workload: Workload,
    order: int,
    builders: Mapping[str, Builder],
    seconds: float,
    limit: float,
    skipped: Mapping[str, str] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The record of one case, ready for JSON.

    An implementation that is wrong, raises an error or exceeds the limit is not timed; the record has the reason.

    Args:
        builders: the implementations by name, that of maml_cuda under MAML_CUDA.
        seconds: how long each implementation is timed.
        limit: seconds in which each must be built and verified.
        skipped: implementations that are not tried, with the reason.
        log: receives progress messages.
    """
    first_order = order == 1
    model, tasks = workload.build()
    flops = meta_step_flops(workload, model, tasks, first_order)
    log("float64 reference")
    expected = {name: grad.numpy() for name, grad in reference_gradient(workload, model, tasks, first_order).items()}

    threads = torch.get_num_threads()
    results: dict[str, Result] = {}
    with ExitStack() as processes:
        started: dict[str, SeparateProcess] = {}
        for name, build in builders.items():
            if name in (skipped or {}):
                results[name] = {"status": "no result", "reason": skipped[name]}
                continue
            log(f"verify {name}")
            worker = SeparateProcess("forkserver")
            processes.callback(worker.stop)
            job = (".jobs:prepare", build, workload, first_order, expected, threads, seconds * WARM_UP)
            results[name] = outcome(worker, job, limit)
            if results[name]["status"] == "verified":
                started[name] = worker
            else:
                worker.stop()
        timings = time_all(started, results, threads, seconds, processes, log)

    sgemm_rate = SGEMM_FLOPS / timings.pop(SGEMM).quartiles()[1]
    floor = flops / sgemm_rate  # seconds of the FLOP at the rate of sgemm
    for name, timing in timings.items():
        if results[name]["status"] == "verified":
            share = floor / timing.quartiles()[1]
            results[name] |= summary(timing) | {"status": "timed", "floor_fraction": share}

    shapes = ("tasks", "support", "query", "inner_steps", "inner_lr", "loss")
    return {
        "workload": workload.name,
        "order": order,
        **{name: getattr(workload, name) for name in shapes},
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "sgemm_gflops": sgemm_rate / 1e9,
        "floor_ms": floor * 1e3,
        "sides": results,
        **verdict(results, floor * 1e3),
    }


def outcome(worker: SeparateProcess, job: tuple[Any, ...], limit: float) -> Result:
    """Runs the job that prepares an implementation. Failures of any kind are results; the benchmark goes on."""
    target, *arguments = job
    try:
        (found,) = worker.run(target, *arguments, seconds=limit)
    except TimedOut:
        return {"status": "no result", "reason": f"no result in {limit:g} s"}
    except Failed as error:
        return {"status": "failed", "reason": str(error)}
    return found


def time_all(
    started: Mapping[str, SeparateProcess], results: Mapping[str, Result], threads: int, seconds: float,
    processes: ExitStack, log: Callable[[str], None],
) -> dict[str, Timing]:  # fmt: skip
    """The timings of the verified implementations and of sgemm."""
    sgemm = SeparateProcess("forkserver")
    processes.callback(sgemm.stop)
    (ready,) = sgemm.run(".jobs:prepare_sgemm", threads, seconds * WARM_UP, seconds=GRACE)
    once = {name: results[name].pop("once") for name in started} | {SGEMM: ready["once"]}
    log(f"time {', '.join(started)}")
    blocks = {name: partial(block, worker, results[name], once[name]) for name, worker in started.items()}
    return interleave(blocks | {SGEMM: partial(block, sgemm, None, once[SGEMM])}, once, seconds)


def block(worker: SeparateProcess, result: Result | None, once: float, seconds: float) -> Timing:
    """Times one block. An implementation that fails is not timed again."""
    if result is not None and result["status"] != "verified":
        return Timing()
    limit = GRACE + 10 * max(once, seconds)
    try:
        (piece,) = worker.run(".jobs:block", seconds, seconds=limit)
    except Failed as error:
        if result is None:
            raise
        result |= {"status": "failed", "reason": f"during timing: {error}"}
        return Timing()
    return Timing(**piece)


def summary(timing: Timing) -> dict[str, Any]:
    """Wall and CPU time of a meta-step in milliseconds."""
    q1, median, q3 = (t * 1e3 for t in timing.quartiles())
    cpu = statistics.median(timing.cpu) * 1e3
    return {"wall_ms": {"q1": q1, "median": median, "q3": q3}, "cpu_ms": cpu, "steps": len(timing.wall)}


def verdict(results: Mapping[str, Result], floor_ms: float) -> dict[str, Any]:
    """The fastest baseline, the speed-up of maml_cuda over it, and the speed-up if all FLOP ran at the rate of sgemm.

    None where a time is missing.
    """
    medians = {name: result["wall_ms"]["median"] for name, result in results.items() if result["status"] == "timed"}
    own = medians.pop(MAML_CUDA, None)
    fastest = min(medians, key=medians.__getitem__, default=None)
    return {
        "fastest_rival": fastest,
        "speed_up": medians[fastest] / own if own and fastest else None,
        "speed_up_limit": medians[fastest] / floor_ms if fastest else None,
    }

"""One case of the benchmark, a workload at one order: prove every side, time those that are right, sum up.

Each side has a process of its own, so that a crash or a hang costs that side only and its memory is its own. One of
them runs at a time, in interleaved rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from .entrants import OURS
from .flops import meta_step_flops
from .proof import truth
from .rivals import Builder
from .timing import SGEMM_FLOPS, Timing, interleave
from .worker import Apart, Failed, Stopped
from .workloads import Workload

Side = dict[str, Any]
SGEMM = "sgemm"
PATIENCE = 60.0  # seconds that a block may take beyond ten times what it should
WARM_UP = 0.1  # of the timed seconds


def measure(
    workload: Workload,
    order: int,
    builders: Mapping[str, Builder],
    seconds: float,
    limit: float,
    given_up: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The record of one case, plain enough for JSON; `builders` are the sides by name, ours under OURS.

    Each is timed for so many `seconds`, and has `limit` seconds to be built and proven. A side with a wrong answer, an
    error or no answer in time is reported with the reason and not timed; one in `given_up` is not even tried.
    """
    first_order = order == 1
    model, tasks = workload.build()
    flops = meta_step_flops(workload, model, tasks, first_order)
    say("float64 reference")
    expected = {name: grad.numpy() for name, grad in truth(workload, model, tasks, first_order).items()}

    threads = torch.get_num_threads()
    sides: dict[str, Side] = {}
    with ExitStack() as processes:
        started: dict[str, Apart] = {}
        for name, build in builders.items():
            if name in (given_up or {}):
                sides[name] = {"status": "no result", "reason": given_up[name]}
                continue
            say(f"prove {name}")
            worker = Apart("forkserver")
            processes.callback(worker.stop)
            job = (".side:prepare", build, workload, first_order, expected, threads, seconds * WARM_UP)
            sides[name] = outcome(worker, job, limit)
            if sides[name]["status"] == "proven":
                started[name] = worker
            else:
                worker.stop()
        timings = time_all(started, sides, threads, seconds, processes, say)

    sgemm_rate = SGEMM_FLOPS / timings.pop(SGEMM).quartiles()[1]
    floor = flops / sgemm_rate
    for name, timing in timings.items():
        if sides[name]["status"] == "proven":
            sides[name] |= summary(timing) | {"status": "timed", "floor_fraction": floor / timing.quartiles()[1]}

    shapes = ("tasks", "support", "query", "inner_steps", "inner_lr", "loss")
    return {
        "workload": workload.name,
        "order": order,
        **{name: getattr(workload, name) for name in shapes},
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "sgemm_gflops": sgemm_rate / 1e9,
        "floor_ms": floor * 1e3,
        "sides": sides,
        **verdict(sides, floor * 1e3),
    }


def outcome(worker: Apart, job: tuple[Any, ...], limit: float) -> Side:
    """What came of a side's preparation; a failure of whatever kind is a result and not the benchmark's end."""
    target, *arguments = job
    try:
        (found,) = worker.run(target, *arguments, seconds=limit)
    except Stopped:
        return {"status": "no result", "reason": f"no result in {limit:g} s"}
    except Failed as error:
        return {"status": "failed", "reason": str(error)}
    return found


def time_all(
    started: Mapping[str, Apart], sides: Mapping[str, Side], threads: int, seconds: float, processes: ExitStack,
    say: Callable[[str], None],
) -> dict[str, Timing]:  # fmt: skip
    """The timings of every side that has started, and of sgemm."""
    yardstick = Apart("forkserver")
    processes.callback(yardstick.stop)
    (ready,) = yardstick.run(".side:prepare_sgemm", threads, seconds * WARM_UP, seconds=PATIENCE)
    once = {name: sides[name].pop("once") for name in started} | {SGEMM: ready["once"]}
    say(f"time {', '.join(started)}")
    blocks = {name: partial(block, worker, sides[name], once[name]) for name, worker in started.items()}
    return interleave(blocks | {SGEMM: partial(block, yardstick, None, once[SGEMM])}, once, seconds)


def block(worker: Apart, side: Side | None, once: float, seconds: float) -> Timing:
    """One side's turn; a side that fails now is out of the race."""
    if side is not None and side["status"] != "proven":
        return Timing()
    patience = PATIENCE + 10 * max(once, seconds)
    try:
        (piece,) = worker.run(".side:block", seconds, seconds=patience)
    except Failed as error:
        if side is None:
            raise
        side |= {"status": "failed", "reason": f"while it was timed: {error}"}
        return Timing()
    return Timing(**piece)


def summary(timing: Timing) -> dict[str, Any]:
    """Wall and CPU time of a step in milliseconds."""
    q1, median, q3 = (t * 1e3 for t in timing.quartiles())
    cpu = statistics.median(timing.cpu) * 1e3
    return {"wall_ms": {"q1": q1, "median": median, "q3": q3}, "cpu_ms": cpu, "steps": len(timing.wall)}


def verdict(sides: Mapping[str, Side], floor_ms: float) -> dict[str, Any]:
    """The fastest rival that was right, how many times faster we are, and how many times sgemm's rate would allow.

    None where a side is missing.
    """
    medians = {name: side["wall_ms"]["median"] for name, side in sides.items() if side["status"] == "timed"}
    ours = medians.pop(OURS, None)
    fastest = min(medians, key=medians.__getitem__, default=None)
    return {
        "fastest_rival": fastest,
        "speed_up": medians[fastest] / ours if ours and fastest else None,
        "speed_up_limit": medians[fastest] / floor_ms if fastest else None,
    }

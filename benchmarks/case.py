"""One case of the benchmark, a workload at one order: prove every side, time those that are right, sum up."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from .flops import meta_step_flops
from .proof import WrongAnswer, prove, truth
from .rivals import Builder, Step
from .timing import SGEMM_FLOPS, Timing, interleave, sgemm
from .workloads import Workload

OURS = "maml_cuda"


def measure(
    workload: Workload,
    order: int,
    builders: Mapping[str, Builder],
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The record of one case, plain enough for JSON; `builders` are the sides by name, ours under OURS.

    A side with a wrong answer or an error is reported with the reason and not timed.
    """
    first_order = order == 1
    model, tasks = workload.build()
    flops = meta_step_flops(workload, model, tasks, first_order)
    say("float64 reference")
    expected = truth(workload, model, tasks, first_order)

    sides: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, build in builders.items():
        say(f"prove {name}")
        try:
            float64, float32 = prove(build, workload, model, tasks, first_order, expected)
        except WrongAnswer as error:
            sides[name] = {"status": "wrong", "reason": str(error)}
        except Exception as error:  # a rival's failure, of whatever kind, is a result and not the benchmark's end
            sides[name] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        else:
            sides[name] = {"status": "timed", "error_float64": float64, "error_float32": float32}
            steps[name] = build(workload, copy.deepcopy(model), tasks, first_order)

    say(f"time {', '.join(steps)}")
    timings = interleave({**steps, "sgemm": sgemm()}, seconds)
    sgemm_rate = SGEMM_FLOPS / timings.pop("sgemm").quartiles()[1]
    floor = flops / sgemm_rate
    for name, timing in timings.items():
        sides[name] |= summary(timing) | {"floor_fraction": floor / timing.quartiles()[1]}

    shapes = ("tasks", "support", "query", "inner_steps", "inner_lr", "loss")
    return {
        "workload": workload.name,
        "order": order,
        **{name: value for name, value in dataclasses.asdict(workload).items() if name in shapes},
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "sgemm_gflops": sgemm_rate / 1e9,
        "floor_ms": floor * 1e3,
        "sides": sides,
        **verdict(sides),
    }


def summary(timing: Timing) -> dict[str, Any]:
    """Wall and CPU time of a step in milliseconds."""
    q1, median, q3 = (t * 1e3 for t in timing.quartiles())
    cpu = statistics.median(timing.cpu) * 1e3
    return {"wall_ms": {"q1": q1, "median": median, "q3": q3}, "cpu_ms": cpu, "steps": len(timing.wall)}


def verdict(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fastest rival that was right, and how many times faster we are; None where either is missing."""
    medians = {name: side["wall_ms"]["median"] for name, side in sides.items() if side["status"] == "timed"}
    ours = medians.pop(OURS, None)
    fastest = min(medians, key=medians.__getitem__, default=None)
    speed_up = medians[fastest] / ours if ours and fastest else None
    return {"fastest_rival": fastest, "speed_up": speed_up}

"""Which kernels a meta-step spends its time in: a job, and the program that Nsight Compute looks at.

`python -m benchmarks.gpu.profile CASE PRECISION` runs two meta-steps of a case, as they are called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from .cases import Case, cases
from .entrants import moved, release
from .machine import machine
from .sides import allow_tf32, ours

PRECISIONS = ("float32", "tf32")
STEPS = 3


def kernels(case: Case) -> Iterator[dict[str, Any]]:
    """By precision and kernel: launches and microseconds of a step, those that take most first."""
    on, workload = machine(case.emulated), case.workload()
    model, tasks = moved(workload, on)
    allow_tf32(False)
    for precision in PRECISIONS:
        step = ours(precision, True)(workload, model, tasks, case.order == 1)
        for _ in range(3):  # the second call captures its graph
            step()
        found = on.kernels(step, STEPS)
        ordered = dict(sorted(found.items(), key=lambda item: -item[1]["us"]))
        total = sum(kernel["us"] for kernel in found.values())
        launches = sum(kernel["launches"] for kernel in found.values())
        yield {precision: ordered, "say": f"{case}, {precision}: {launches:g} launches, {total:.4g} us in kernels"}
    release(on)


def main(name: str, precision: str) -> None:
    (case,) = cases(quick=False, emulated=False, names=[name])
    model, tasks = moved(case.workload(), machine(False))
    step = ours(precision, False)(case.workload(), model, tasks, case.order == 1)
    for _ in range(2):
        step()
    machine(False).synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The job that measures the time of a meta-step by kernel.

`python -m benchmarks.gpu.profile CASE PRECISION` runs two meta-steps of a case, for Nsight Compute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from .cases import Case, cases
from .implementations import allow_tf32, fused
from .machine import machine
from .timing import on_device, release

PRECISIONS = ("float32", "tf32")
STEPS = 3


def kernels(case: Case) -> Iterator[dict[str, Any]]:
    """Launches and microseconds per step by precision and kernel, the slowest kernel first."""
    device, workload = machine(case.emulated), case.workload()
    model, tasks = on_device(workload, device)
    allow_tf32(False)
    for precision in PRECISIONS:
        step = fused(precision, True)(workload, model, tasks, case.order == 1)
        for _ in range(3):  # the second call captures its graph
            step()
        found = device.kernels(step, STEPS)
        ordered = dict(sorted(found.items(), key=lambda item: -item[1]["us"]))
        total = sum(kernel["us"] for kernel in found.values())
        launches = sum(kernel["launches"] for kernel in found.values())
        yield {precision: ordered, "say": f"{case}, {precision}: {launches:g} launches, {total:.4g} us in kernels"}
    release(device)


def main(name: str, precision: str) -> None:
    (case,) = cases(quick=False, emulated=False, names=[name])
    model, tasks = on_device(case.workload(), machine(False))
    step = fused(precision, False)(case.workload(), model, tasks, case.order == 1)
    for _ in range(2):
        step()
    machine(False).synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])

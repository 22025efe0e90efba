"""Interleaved timing: every side runs in every round, and a slow minute of the machine hits them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 10


@dataclass
class Timing:
    """Seconds per step: `wall` of each step, `cpu` (all threads of the process) as each block's mean."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile of the wall time."""
        q1, median, q3 = statistics.quantiles(self.wall, n=4, method="inclusive")
        return q1, median, q3


def run_block(step: Callable[[], object], seconds: float) -> Timing:
    """Run step for the given seconds, at least once; first collect the garbage of the side before."""
    gc.collect()
    timing = Timing()
    cpu = time.process_time()
    begin = now = time.perf_counter()
    while True:
        step()
        last, now = now, time.perf_counter()
        timing.wall.append(now - last)
        if now - begin >= seconds:
            break
    timing.cpu.append((time.process_time() - cpu) / len(timing.wall))
    return timing


def interleave(steps: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Time every step for about `seconds`, in rounds of one block a side, after a fifth of that as warm-up.

    A step so slow that MAX_ROUNDS of it would pass the budget lowers the number of rounds for all, to
    MIN_ROUNDS at least; the others then run longer blocks.
    """
    gc.collect()
    gc.freeze()  # spares each block's collection a walk through all that torch has imported
    try:
        slowest = max(run_block(step, seconds / 5).wall[-1] for step in steps.values())
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / slowest)))
        timings = {name: Timing() for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                block = run_block(step, seconds / rounds)
                timings[name].wall += block.wall
                timings[name].cpu += block.cpu
    finally:
        gc.unfreeze()
    return timings


SGEMM_SIZE = 1024
SGEMM_FLOPS = 2 * SGEMM_SIZE**3


def sgemm() -> Callable[[], object]:
    """The machine's own float32 matrix product (torch's BLAS, all threads): the FLOP floor's yardstick."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)

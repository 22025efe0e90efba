"""Interleaved timing: every side runs in turn, and a slow minute of the machine hits them all."""

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
    """Run step for the given seconds, at least once. The first step finds cold caches, and counts only if alone."""
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
    if len(timing.wall) > 1:
        del timing.wall[0]
    return timing


Block = Callable[[float], Timing]


def interleave(blocks: Mapping[str, Block], once: Mapping[str, float], seconds: float) -> dict[str, Timing]:
    """Time every side for about `seconds`, in up to MAX_ROUNDS rounds; `once` is what a step of it takes.

    A side so slow that MAX_ROUNDS of its steps would pass the budget sits out rounds, but is in MIN_ROUNDS at least.
    """
    timings = {name: Timing() for name in blocks}
    for number in range(MAX_ROUNDS):
        for name, block in blocks.items():
            if number % every(once[name], seconds) == 0:
                timing = block(seconds / MAX_ROUNDS)
                timings[name].wall += timing.wall
                timings[name].cpu += timing.cpu
    return timings


def every(once: float, seconds: float) -> int:
    """In each how many rounds a side of so slow a step runs."""
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / once)))
    return (MAX_ROUNDS - 1) // (rounds - 1)


SGEMM_SIZE = 1024
SGEMM_FLOPS = 2 * SGEMM_SIZE**3


def sgemm() -> Callable[[], object]:
    """The machine's own float32 matrix product (torch's BLAS, all threads): the FLOP floor's yardstick."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)

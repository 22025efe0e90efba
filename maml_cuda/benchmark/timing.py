"""Interleaved timing: implementations run in turn, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MIN_ROUNDS, MAX_ROUNDS = 3, 10


@dataclass
class Timing:
    """Seconds per step: `wall` time of each step; `cpu` time of the process, all threads, as the mean of each block."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the wall time."""
        q1, median, q3 = statistics.quantiles(self.wall, n=4, method="inclusive")
        return q1, median, q3


def run_block(step: Callable[[], object], seconds: float) -> Timing:
    """Runs the step for the given seconds, at least once. The first step has cold caches; it counts only if alone."""
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
    """Times every implementation for about `seconds`, in at most MAX_ROUNDS rounds. `once`: seconds of one step.

    An implementation whose steps are too slow for MAX_ROUNDS rounds skips some, but runs in at least MIN_ROUNDS.
    """
    timings = {name: Timing() for name in blocks}
    for number in range(MAX_ROUNDS):
        for name, block in blocks.items():
            if number % rounds_between(once[name], seconds) == 0:
                timing = block(seconds / MAX_ROUNDS)
                timings[name].wall += timing.wall
                timings[name].cpu += timing.cpu
    return timings


def rounds_between(once: float, seconds: float) -> int:
    """An implementation with steps of `once` seconds runs in every n-th round; returns n."""
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / once)))
    return (MAX_ROUNDS - 1) // (rounds - 1)

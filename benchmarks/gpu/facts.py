"""Facts of the device that decide what a meta-step can cost: launches, graph nodes, matrix rates, bandwidth.

A job (../worker.py): one piece a fact, `{"value", "unit", "of"}`, or `{"failed"}` in words.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..worker import Lost, words
from ..workloads import WORKLOADS, Tasks
from .machine import Machine, machine
from .sides import allow_tf32, ours

REPEATS = 7
Value = tuple[float, str, str]  # value, unit, what was measured


def facts(emulated: bool) -> Iterator[dict[str, Any]]:
    on = machine(emulated)
    measured: dict[str, Callable[[Machine, bool], Value]] = {"launch": launch}
    if on.has_graphs:
        measured |= {"graph launch": graph_launch, "graph node": graph_node}
    measured |= {"overhead, called": overhead_called}
    if on.has_graphs:
        measured |= {"overhead, captured": overhead_captured}
    for name in RATES:
        measured[f"matmul {name}"] = rate(name)
    measured["copy"] = copy_bandwidth
    for name, measure in measured.items():
        try:
            value, unit, of = measure(on, emulated)
        except Exception as error:  # one fact that fails is no reason to go without the others
            yield {name: {"failed": words(error)}, "say": f"{name}: failed: {words(error)}"}
            check(on, error)
        else:
            yield {name: {"value": value, "unit": unit, "of": of}, "say": f"{name}: {value:.3g} {unit} ({of})"}


def check(on: Machine, error: Exception) -> None:
    """Raises Lost where the error has cost the device."""
    try:
        on.synchronize()
    except Exception as lost:
        raise Lost(words(lost)) from error


def median(on: Machine, step: Callable[[], object], count: int) -> float:
    """Seconds of one step, of the median burst, after a burst to warm up."""
    on.burst(step, count)
    return statistics.median(on.burst(step, count) for _ in range(REPEATS)) / count


def tiny(on: Machine) -> Callable[[], object]:
    x = torch.zeros(1, device=on.torch_device)
    return lambda: x.add_(1)


def launch(on: Machine, small: bool) -> Value:
    return median(on, tiny(on), 50 if small else 2000) * 1e6, "us", "x.add_(1) of one element, called from Python"


def graph_launch(on: Machine, small: bool) -> Value:
    replay = on.capture(tiny(on), 1)
    return median(on, replay, 50 if small else 1000) * 1e6, "us", "replay of a CUDA graph of one tiny kernel"


def graph_node(on: Machine, small: bool) -> Value:
    few, many = (20, 100) if small else (100, 1100)
    short, long = (median(on, on.capture(tiny(on), n), 20) for n in (few, many))
    return (long - short) / (many - few) * 1e6, "us", f"graphs of {many} and of {few} dependent tiny kernels"


def overhead(on: Machine) -> Callable[[], object]:
    workload = WORKLOADS["overhead"]
    model, tasks = workload.build()
    moved = Tasks(*(x.to(on.torch_device) for x in tasks))
    return ours("float32", cuda_graphs=False)(workload, model.to(on.torch_device), moved, False)


def overhead_called(on: Machine, small: bool) -> Value:
    value = median(on, overhead(on), 3 if small else 300)
    return value * 1e6, "us", "a meta-step of one task and one sample (1-40-40-1), forward and backward from Python"


def overhead_captured(on: Machine, small: bool) -> Value:
    copies = 16
    value = median(on, on.capture(overhead(on), copies), 5 if small else 50) / copies
    return value * 1e6, "us", f"the same, {copies} of them in a CUDA graph of the caller's"


RATES: dict[str, tuple[torch.dtype, bool]] = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}


def rate(name: str) -> Callable[[Machine, bool], Value]:
    dtype, tf32 = RATES[name]

    def measure(on: Machine, small: bool) -> Value:
        n = 64 if small else 4096 if dtype == torch.float64 else 8192
        a, b = torch.randn(2, n, n, device=on.torch_device, dtype=torch.float32).to(dtype)
        out = torch.empty_like(a)
        allow_tf32(tf32)
        try:
            seconds = median(on, lambda: torch.mm(a, b, out=out), 2 if small else 5)
        finally:
            allow_tf32(False)
        return 2 * n**3 / seconds / 1e12, "TFLOP/s", f"torch.mm of {n} x {n}"

    return measure


def copy_bandwidth(on: Machine, small: bool) -> Value:
    size = 2**16 if small else 2**28
    a = torch.empty(size, dtype=torch.uint8, device=on.torch_device)
    b = torch.zeros_like(a)
    seconds = median(on, lambda: a.copy_(b), 2 if small else 10)
    return 2 * size / seconds / 1e9, "GB/s", f"read and written, copy of {size >> 10} KiB"

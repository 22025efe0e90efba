"""Rates of the device that bound the time of a meta-step: launches, graph nodes, matrix products, bandwidth.

A job (../worker.py) that yields one piece per rate: value, unit and what was measured (`of`), or the reason of a
failure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..worker import DeviceLost, describe_error
from ..workloads import WORKLOADS, Tasks
from .implementations import allow_tf32, fused
from .machine import Machine, machine

REPEATS = 7
Value = tuple[float, str, str]  # value, unit, what was measured


def facts(emulated: bool) -> Iterator[dict[str, Any]]:
    device = machine(emulated)
    measured: dict[str, Callable[[Machine, bool], Value]] = {"launch": launch}
    if device.has_graphs:
        measured |= {"graph launch": graph_launch, "graph node": graph_node}
    measured |= {"overhead, called": overhead_called}
    if device.has_graphs:
        measured |= {"overhead, captured": overhead_captured}
    for name in RATES:
        measured[f"matmul {name}"] = rate(name)
    measured["copy"] = copy_bandwidth
    for name, measure in measured.items():
        try:
            value, unit, of = measure(device, emulated)
        except Exception as error:  # a failed measurement must not prevent the others
            yield {name: {"failed": describe_error(error)}, "say": f"{name}: failed: {describe_error(error)}"}
            raise_if_lost(device, error)
        else:
            yield {name: {"value": value, "unit": unit, "of": of}, "say": f"{name}: {value:.3g} {unit} ({of})"}


def raise_if_lost(device: Machine, error: Exception) -> None:
    """Raises DeviceLost if the device no longer responds after the error."""
    try:
        device.synchronize()
    except Exception as lost:
        raise DeviceLost(describe_error(lost)) from error


def median(device: Machine, step: Callable[[], object], count: int) -> float:
    """Seconds per step: the median over bursts of `count` steps, after a warm-up burst."""
    device.burst(step, count)
    return statistics.median(device.burst(step, count) for _ in range(REPEATS)) / count


def tiny(device: Machine) -> Callable[[], object]:
    x = torch.zeros(1, device=device.torch_device)
    return lambda: x.add_(1)


def launch(device: Machine, small: bool) -> Value:
    return (
        median(device, tiny(device), 50 if small else 2000) * 1e6,
        "us",
        "x.add_(1) of one element, called from Python",
    )


def graph_launch(device: Machine, small: bool) -> Value:
    replay = device.capture(tiny(device), 1)
    return median(device, replay, 50 if small else 1000) * 1e6, "us", "replay of a CUDA graph of one tiny kernel"


def graph_node(device: Machine, small: bool) -> Value:
    few, many = (20, 100) if small else (100, 1100)
    short, long = (median(device, device.capture(tiny(device), n), 20) for n in (few, many))
    return (
        (long - short) / (many - few) * 1e6,
        "us",
        f"difference between graphs of {many} and {few} dependent tiny kernels",
    )


def overhead(device: Machine) -> Callable[[], object]:
    workload = WORKLOADS["overhead"]
    model, tasks = workload.build()
    moved = Tasks(*(x.to(device.torch_device) for x in tasks))
    return fused("float32", cuda_graphs=False)(workload, model.to(device.torch_device), moved, False)


def overhead_called(device: Machine, small: bool) -> Value:
    value = median(device, overhead(device), 3 if small else 300)
    return value * 1e6, "us", "a meta-step with one task and one sample (layers 1-40-40-1), called from Python"


def overhead_captured(device: Machine, small: bool) -> Value:
    copies = 16
    value = median(device, device.capture(overhead(device), copies), 5 if small else 50) / copies
    return value * 1e6, "us", f"the same, {copies} meta-steps in one CUDA graph captured by the caller"


RATES: dict[str, tuple[torch.dtype, bool]] = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}


def rate(name: str) -> Callable[[Machine, bool], Value]:
    dtype, tf32 = RATES[name]

    def measure(device: Machine, small: bool) -> Value:
        n = 64 if small else 4096 if dtype == torch.float64 else 8192
        a, b = torch.randn(2, n, n, device=device.torch_device, dtype=torch.float32).to(dtype)
        out = torch.empty_like(a)
        allow_tf32(tf32)
        try:
            seconds = median(device, lambda: torch.mm(a, b, out=out), 2 if small else 5)
        finally:
            allow_tf32(False)
        return 2 * n**3 / seconds / 1e12, "TFLOP/s", f"torch.mm of {n} x {n}"

    return measure


def copy_bandwidth(device: Machine, small: bool) -> Value:
    size = 2**16 if small else 2**28
    a = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
    b = torch.zeros_like(a)
    seconds = median(device, lambda: a.copy_(b), 2 if small else 10)
    return 2 * size / seconds / 1e9, "GB/s", f"bytes read and written in a copy of {size >> 10} KiB"

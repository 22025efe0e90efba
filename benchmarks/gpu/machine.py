"""The device under measurement: the GPU, or on a CPU the emulation of the kernels in its place.

All that the benchmark asks of a device is here: events, synchronization, memory, graphs, names.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
Step = Callable[[], object]


class Gpu:
    """CUDA device 0 of torch."""

    torch_device = torch.device("cuda", 0)
    has_graphs = True

    def describe(self) -> dict[str, Any]:
        own = torch.cuda.get_device_properties(0)
        return {
            "name": own.name,
            "multiprocessors": own.multi_processor_count,
            "capability": f"{own.major}.{own.minor}",
            "memory_gib": round(own.total_memory / 2**30, 1),
            "cuda_of_torch": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def burst(self, step: Step, count: int) -> float:
        """Seconds of `count` steps in a row, between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def capture(self, step: Step, copies: int) -> Step:
        """The replay of a CUDA graph of so many steps; like torch's own recipe, after three on a side stream."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its own stream the current one; the outer context puts back ours.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            for _ in range(copies):
                step()
        return graph.replay

    def kernels(self, step: Step, steps: int) -> dict[str, dict[str, float]]:
        """By name of the kernel: launches and microseconds of one step, by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(steps):
                step()
            self.synchronize()
        found: dict[str, dict[str, float]] = {}
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                add_kernel(found, event.name, event.time_range.elapsed_us(), steps)
        return found

    def peak(self, action: Callable[[], Any]) -> tuple[Any, int | None]:
        """What the action gives, and the most bytes of torch's allocator beyond those in use before it."""
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = action()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated() - before


class Emulated:
    """The kernels on the CPU, by the emulation that the tests use: all of the command's logic, no true times."""

    torch_device = torch.device("cpu")
    has_graphs = False

    def describe(self) -> dict[str, Any]:
        return {"name": "emulated GPU", "multiprocessors": None, "capability": None, "memory_gib": None}

    def synchronize(self) -> None:
        pass

    def burst(self, step: Step, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - begin

    def capture(self, step: Step, copies: int) -> Step:
        raise NotImplementedError("the emulation has no graphs of torch")

    def kernels(self, step: Step, steps: int) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        with tests_emulated().log(small_tiles=True) as logged:
            for _ in range(steps):
                step()
            for launch in logged():
                add_kernel(found, launch["kernel"], launch["seconds"] * 1e6, steps)
        return found

    def peak(self, action: Callable[[], Any]) -> tuple[Any, int | None]:
        return action(), None


def add_kernel(found: dict[str, dict[str, float]], name: str, us: float, steps: int) -> None:
    kernel = found.setdefault(name, {"launches": 0.0, "us": 0.0})
    kernel["launches"] += 1 / steps
    kernel["us"] += us / steps


Machine = Gpu | Emulated


@functools.cache
def machine(emulated: bool) -> Machine:
    return Emulated() if emulated else Gpu()


@contextmanager
def emulation() -> Iterator[None]:
    """Puts the emulated kernels in the GPU's place, as the tests do, with the small tiles, which are faster there."""
    with tests_emulated().in_place_of_a_gpu(precisions=True, small_tiles=True):
        yield


@contextmanager
def emulated_log(only: bool) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The emulated kernels with the tiles that ship, in the GPU's place, and what they launch; `only`: and they do
    nothing."""
    with tests_emulated().in_place_of_a_gpu(precisions=True), tests_emulated().log(only=only) as logged:
        yield logged


def tests_emulated() -> Any:
    if str(ROOT) not in sys.path:  # appended: the checkout's maml_cuda must not hide an installed one
        sys.path.append(str(ROOT))
    return importlib.import_module("tests.emulated")

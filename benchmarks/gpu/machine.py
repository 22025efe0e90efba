"""The device that is measured: a GPU, or the emulation of the kernels on a CPU.

Both classes have the same interface: description, timing, synchronization, CUDA graphs, kernel times and peak memory.
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
        """Seconds of `count` consecutive steps, between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def capture(self, step: Step, copies: int) -> Step:
        """The replay of a CUDA graph of `copies` steps, captured after three steps on a side stream as torch asks."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A failed capture leaves its stream as the current one; the outer context restores the right one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            for _ in range(copies):
                step()
        return graph.replay

    def kernels(self, step: Step, steps: int) -> dict[str, dict[str, float]]:
        """Launches and microseconds per step for each kernel name, by torch's profiler."""
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
        """The result of the action, and the peak bytes of torch's allocator minus those in use before it."""
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = action()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated() - before


class Emulated:
    """The emulation of the kernels on the CPU, to test the command. Its times are not meaningful."""

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
        raise NotImplementedError("the emulation does not support CUDA graphs")

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
    """Runs CPU tensors on the emulated kernels, as the tests do, with small tiles, which are faster in emulation."""
    with tests_emulated().in_place_of_a_gpu(precisions=True, small_tiles=True):
        yield


@contextmanager
def emulated_log(only: bool) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The emulated kernels with the tile sizes of a GPU, and a log of their launches. `only`: log without running."""
    with tests_emulated().in_place_of_a_gpu(precisions=True), tests_emulated().log(only=only) as logged:
        yield logged


def tests_emulated() -> Any:
    if str(ROOT) not in sys.path:  # appended, so that an installed maml_cuda takes precedence
        sys.path.append(str(ROOT))
    return importlib.import_module("tests.emulated")

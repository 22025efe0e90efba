"""One side of a case in a process of its own: jobs (worker.py) that prove it, and run it when its turn comes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

import torch

from .memory import peak_bytes
from .proof import WrongAnswer, prove
from .rivals import Builder, Step
from .timing import run_block, sgemm
from .workloads import Workload

Piece = dict[str, Any]

_step: Step  # of this process


def prepare(
    build: Builder, workload: Workload, first_order: bool, expected: Mapping[str, Any], threads: int, seconds: float
) -> Iterator[Piece]:
    """Builds and proves the side and warms it up for so many seconds.

    Status "proven" with errors, memory and what a step takes; or "wrong" or "missing" with the reason in words.
    `expected` are arrays of numpy, which travel as they are.
    """
    global _step
    torch.set_num_threads(threads)
    model, tasks = workload.build()
    begin = perf_counter()
    try:
        truth = {name: torch.from_numpy(grad) for name, grad in expected.items()}
        float64, float32, _step = prove(build, workload, model, tasks, first_order, truth)
    except WrongAnswer as error:
        yield {"status": "wrong", "reason": str(error)}
        return
    except ModuleNotFoundError as error:
        yield {"status": "missing", "reason": str(error)}
        return
    found = {"error_float64": float64, "error_float32": float32, "build_seconds": perf_counter() - begin}
    if note := getattr(_step, "note", None):
        found["note"] = note
    begin = perf_counter()
    peak = peak_bytes(_step)
    yield {"status": "proven", **found, "peak_bytes": peak, **warm_up(seconds, perf_counter() - begin)}


def prepare_sgemm(threads: int, seconds: float) -> Iterator[Piece]:
    global _step
    torch.set_num_threads(threads)
    _step = sgemm()
    yield warm_up(seconds)


def warm_up(seconds: float, once: float = 0.0) -> Piece:
    """For so many seconds, unless a step takes longer (`once`) and has just run."""
    if once < seconds:
        once = run_block(_step, seconds).wall[-1]
    gc.collect()
    gc.freeze()  # spares each block's collection a walk through all that was imported
    return {"once": once}


def block(seconds: float) -> Iterator[Piece]:
    timing = run_block(_step, seconds)
    yield {"wall": timing.wall, "cpu": timing.cpu}

"""The jobs of a worker process (worker.py): verify one implementation, and time it block by block."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

import torch

from maml_cuda.benchmark.baselines import Step
from maml_cuda.benchmark.memory import peak_bytes
from maml_cuda.benchmark.timing import run_block
from maml_cuda.benchmark.verification import WrongGradient

from .meta_steps import Builder
from .sgemm import sgemm
from .verification import verify
from .workloads import Workload

Piece = dict[str, Any]

_step: Step  # what this process times


def prepare(
    build: Builder, workload: Workload, first_order: bool, expected: Mapping[str, Any], threads: int, seconds: float
) -> Iterator[Piece]:
    """Builds and verifies an implementation, measures its memory and warms it up for the given seconds.

    `expected`: the float64 gradients as numpy arrays. Yields the status "verified" with errors, memory and the seconds
    of a step; or "wrong" or "missing" with the reason.
    """
    global _step
    torch.set_num_threads(threads)
    model, tasks = workload.build()
    begin = perf_counter()
    try:
        reference = {name: torch.from_numpy(grad) for name, grad in expected.items()}
        float64, float32, _step = verify(build, workload, model, tasks, first_order, reference)
    except WrongGradient as error:
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
    yield {"status": "verified", **found, "peak_bytes": peak, **warm_up(seconds, perf_counter() - begin)}


def prepare_sgemm(threads: int, seconds: float) -> Iterator[Piece]:
    """Prepares the matrix product whose rate the meta-steps are compared with."""
    global _step
    torch.set_num_threads(threads)
    _step = sgemm()
    yield warm_up(seconds)


def warm_up(seconds: float, once: float = 0.0) -> Piece:
    """Runs the step for the given seconds; not if one step, which has just run, takes longer (`once`)."""
    if once < seconds:
        once = run_block(_step, seconds).wall[-1]
    gc.collect()
    gc.freeze()  # the collections before each block skip the objects of imported modules
    return {"once": once}


def block(seconds: float) -> Iterator[Piece]:
    """Times the step for the given seconds."""
    timing = run_block(_step, seconds)
    yield {"wall": timing.wall, "cpu": timing.cpu}

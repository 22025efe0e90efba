"""Jobs (benchmarks/worker.py) in the process of one version: results of a case, and timed steps of one."""

from __future__ import annotations

import gc
import importlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..worker import describe_error
from .cases import Case

EMULATED = "emulated"  # in place of an instruction set: the CUDA kernels compiled for the CPU

_step: Callable[[], object]  # of this process
_emulation: Any = None


def enter(folder: str, isa: str) -> None:
    """Makes this process one of the version in `folder`, on an instruction set; "": the best of this machine.

    Raises:
        ImportError: maml_cuda was found elsewhere, or on another instruction set.
    """
    global _emulation
    if "maml_cuda" not in sys.modules:
        warnings.simplefilter("ignore")
        sys.path.insert(0, folder)
        if isa not in ("", EMULATED):
            os.environ["MAML_CUDA_CPU_ISA"] = isa
    import maml_cuda

    found = Path(str(maml_cuda.__file__))
    if not found.resolve().is_relative_to(Path(folder).resolve()):
        raise ImportError(f"maml_cuda must be imported from {folder}, got {found.parent}")
    if isa not in ("", EMULATED) and (chosen := maml_cuda.build_info()["cpu_isa"]) != isa:
        raise ImportError(f"maml_cuda must run on {isa}, got {chosen}")
    if isa == EMULATED and _emulation is None:
        _emulation = emulation(Path(folder))
        _emulation.__enter__()


def emulation(checkout: Path) -> Any:
    """The context in which a checkout's tests run its CUDA kernels on the CPU; it knows the modules of its version."""
    for file in sorted(checkout.glob("tests/**/emulated.py")):
        name = ".".join(file.relative_to(checkout).with_suffix("").parts)
        return importlib.import_module(name).in_place_of_a_gpu()
    raise FileNotFoundError(f"{EMULATED} must have a checkout with tests/**/emulated.py, got {checkout}")


def instruction_sets(folder: str, isa: str) -> Iterator[list[str]]:
    """Those of this build that this machine has, widest first."""
    enter(folder, isa)
    import maml_cuda

    info: Any = maml_cuda.build_info()
    yield info["cpu_isas"][info["cpu_isas"].index(info["cpu_isa"]) :]


def bits(folder: str, isa: str, case: Case) -> Iterator[dict[str, Any]]:
    """A hash of each result by name, and in words the error that ended them, or ""."""
    enter(folder, isa)
    from .results import all_results, digest

    hashes: dict[str, str] = {}
    try:
        maml, data, task_weights = case.build()
        backend = "cuda" if isa == EMULATED else "cpu"
        if maml.backend != backend:
            raise RuntimeError(f"backend must be {backend}, got {maml.backend}")
        for name, tensor in all_results(maml, data, task_weights):
            hashes[name] = digest(tensor)
    except Exception as error:
        yield {"hashes": hashes, "error": describe_error(error)}
    else:
        yield {"hashes": hashes, "error": ""}


def prepare(folder: str, isa: str, case: Case, through_autograd: bool, seconds: float) -> Iterator[None]:
    """Builds the meta-step that `block` times, and warms it up."""
    global _step
    enter(folder, isa)
    maml, data, _ = case.build()
    parameters = list(maml.parameters())

    def step() -> None:
        for p in parameters:
            p.grad = None
        if through_autograd:
            maml(*data).loss.backward()
        else:
            maml.backward(*data)

    _step = step
    timed(seconds)
    gc.freeze()
    yield None


def block(seconds: float) -> Iterator[float]:
    """The median time of a step, in seconds."""
    yield statistics.median(timed(seconds))


def timed(seconds: float) -> list[float]:
    """Seconds of each step, of so many seconds of them. No code of maml_cuda, which is what differs."""
    gc.collect()
    wall: list[float] = []
    begin = now = time.perf_counter()
    while not wall or now - begin < seconds:
        _step()
        last, now = now, time.perf_counter()
        wall.append(now - last)
    return wall[1:] or wall  # the first step has cold caches

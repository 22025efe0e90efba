"""The cases that are measured and the baselines on them. The most important come first, because time may run out.

This module must not import maml_cuda, which may not be built yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..workloads import OmniglotNet, Workload, images, mlp, sinusoids
from .machine import Machine


@dataclass(frozen=True)
class Case:
    """A workload with a number of tasks, at one order. `small`: the same model with reduced shapes."""

    workload_name: str
    tasks: int
    order: int
    small: bool = False
    emulated: bool = False

    @property
    def name(self) -> str:
        """The name for `--cases`."""
        return f"{self.workload_name}-t{self.tasks}{'-first-order' if self.order == 1 else ''}"

    def workload(self) -> Workload:
        if self.emulated:
            return TINY[self.workload_name]
        from ..workloads import WORKLOADS

        workload = WORKLOADS[self.workload_name]
        return workload.shrunk() if self.small else dataclasses.replace(workload, tasks=self.tasks)

    def __str__(self) -> str:
        return f"{self.workload_name}, T={self.workload().tasks}, order {self.order}"


# First those with a target (table.py), and the small batch of Omniglot.
WORKLOADS_AND_TASKS = (
    ("omniglot", 4), ("omniglot", 32), ("mini-imagenet", 4), ("sinusoid-k1", 25), ("sinusoid-k5", 25), ("policy", 20),
    ("resnet12", 4), ("sinusoid-k1", 1000), ("sinusoid-k5", 1000),
)  # fmt: skip

PROFILED = ("omniglot-t4", "omniglot-t32", "mini-imagenet-t4")  # unless --cases is given

# Tiny workloads for the emulation, where CUDA threads are slow.
TINY = {
    "sinusoid-k1": Workload("sinusoid-k1", lambda: mlp((1, 8, 1)), sinusoids, "mse", 2, 3, 3, 1, 0.01),
    "omniglot": Workload(
        "omniglot", lambda: OmniglotNet(2, filters=4), images(1, 8, 8, ways=2), "cross_entropy", 2, 4, 4, 1, 0.1, 0.5
    ),
}


def cases(quick: bool, emulated: bool, names: Sequence[str] | None = None) -> list[Case]:
    """The cases with these names (default: all). Second order comes first, because the targets are for it.

    Raises:
        ValueError: unknown name.
    """
    found = [(name, TINY[name].tasks) for name in TINY] if emulated else WORKLOADS_AND_TASKS
    known = {(case := Case(*pair, order, quick, emulated)).name: case for order in (2, 1) for pair in found}
    for name in names or ():
        if name not in known:
            raise ValueError(f"--cases must be of {', '.join(known)}; got {name}")
    return [case for name, case in known.items() if names is None or name in names]


@dataclass(frozen=True)
class Job:
    """A baseline on a case in one precision. `seconds`: for the whole job; `build_seconds`: for compiling."""

    case: Case
    method: str  # a baseline's name
    precision: str
    seconds: float
    build_seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.case.name}: {self.method} {self.precision}"


def baseline_jobs(cases: list[Case], device: Machine) -> list[Job]:
    """The baseline jobs, the fastest baselines of every case first. Compiled baselines run in one precision only,
    because
    compiling takes long."""
    found = []
    for case in cases:
        linear = case.workload().loss == "mse"
        precision = "float32" if linear or not device.has_graphs else "tf32"
        found.append(Job(case, "torch.func vmap", precision, 40))
        if device.has_graphs and case.order == 2:
            build = 40 if linear else 90
            found.append(Job(case, "torch.compile", precision, build + 20, build))
            found += [Job(case, "JAX jit", precision, build + 20, build)] if linear else []
    found += [Job(job.case, "autograd loop", job.precision, 40) for job in found if job.method == "torch.func vmap"]
    others = [job for job in found if job.precision == "tf32" and job.build_seconds is None]
    return found + [Job(job.case, job.method, "float32", job.seconds) for job in others]

"""Which meta-steps are measured, in the order of their importance: the time may end before the list does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..workloads import OmniglotNet, Workload, images, mlp, sinusoids


@dataclass(frozen=True)
class Case:
    """A workload at a number of tasks and an order; `small`: the same net on cut shapes."""

    name: str
    tasks: int
    order: int
    small: bool = False
    emulated: bool = False

    def workload(self) -> Workload:
        if self.emulated:
            return TINY[self.name]
        from ..workloads import WORKLOADS

        workload = WORKLOADS[self.name]
        return workload.shrunk() if self.small else dataclasses.replace(workload, tasks=self.tasks)

    def __str__(self) -> str:
        return f"{self.name}, T={self.workload().tasks}, order {self.order}"


TARGETED = (("omniglot", 32), ("mini-imagenet", 4), ("sinusoid-k1", 25), ("sinusoid-k5", 25), ("policy", 20))
OTHERS = (("omniglot", 4), ("resnet12", 4), ("sinusoid-k1", 1000), ("sinusoid-k5", 1000))

# For the emulation: a CUDA thread is dear there.
TINY = {
    "sinusoid-k1": Workload("sinusoid-k1", lambda: mlp((1, 8, 1)), sinusoids, "mse", 2, 3, 3, 1, 0.01),
    "omniglot": Workload(
        "omniglot", lambda: OmniglotNet(2, filters=4), images(1, 8, 8, ways=2), "cross_entropy", 2, 4, 4, 1, 0.1, 0.5
    ),
}


def cases(quick: bool, emulated: bool) -> tuple[list[Case], list[Case]]:
    """Those with a target, and the others; second order first, for its target is the one in the issue."""
    if emulated:
        return [Case(name, TINY[name].tasks, order, emulated=True) for name in TINY for order in (2, 1)], []
    targeted = [Case(name, tasks, order, quick) for order in (2, 1) for name, tasks in TARGETED]
    others = [Case(name, tasks, order, quick) for order in (2, 1) for name, tasks in OTHERS]
    return targeted, [] if quick else others

"""What two versions are compared on: the benchmark's workloads at both orders, and random plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..growth import points
from ..workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from maml_cuda import FusedMAML

PLANS = "plans"
GAUSSIAN_POLICY = "gaussian-policy"
GROWTH = {f"omniglot-{axis.lower()}{value}": workload for axis, value, workload in points(quick=False)}
# Workloads that version 0.1.0 does not fuse.
NOT_IN_0_1 = {"lstm", "transformer", "transformer-k1", "siren", "siren-gradncp", "mbconv", "unet", "vit", "pinn"}
NAMES = (*(name for name in WORKLOADS if name not in NOT_IN_0_1), *GROWTH, GAUSSIAN_POLICY)


@dataclass(frozen=True)
class Case:
    """A workload by its name, at an order; or plan `number`, which has an order of its own."""

    group: str
    order: int = 0
    number: int = 0
    small: bool = False  # the same net on fewer samples, tasks and steps

    def __str__(self) -> str:
        return f"plan {self.number}" if self.group == PLANS else f"{self.group}, order {self.order}"

    def build(self) -> tuple[FusedMAML, list[Any], Tensor | None]:
        """The FusedMAML, its four arguments, and task weights. It imports maml_cuda: for a process of one version."""
        from maml_cuda import FusedMAML

        if self.group == PLANS:
            from .plans import draw

            plan = draw(self.number)
            return FusedMAML(plan.model, **plan.options, backend="fused"), plan.data, plan.task_weights
        if self.group == GAUSSIAN_POLICY:
            from ..gaussian_policy import LOSS, RATE, SAMPLES, TASKS, Policy, episode

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                policy = Policy()
                samples = episode(policy, *((2, 20) if self.small else (TASKS, SAMPLES)))
            return FusedMAML(policy, RATE, 1, loss=LOSS, first_order=self.order == 1, backend="fused"), samples, None
        workload = self._workload()
        model, tasks = workload.build()
        maml = FusedMAML(
            model, workload.inner_lr, workload.inner_steps, loss=workload.loss, first_order=self.order == 1,
            backend="fused",
        )  # fmt: skip
        return maml, list(tasks), None

    def _workload(self) -> Workload:
        workload = {**WORKLOADS, **GROWTH}[self.group]
        return workload.shrunk() if self.small else workload


def of_workloads(names: Iterable[str], small: bool = False) -> Iterator[Case]:
    """Both orders of each."""
    for name in names:
        for order in (1, 2):
            yield Case(name, order, small=small)


def of_plans(count: int) -> Iterator[Case]:
    for number in range(count):
        yield Case(PLANS, number=number)

"""pytest-benchmark cases of our own meta-steps, to guard against regressions.

Run `pytest benchmarks --benchmark-only --benchmark-autosave`, and later again with `--benchmark-compare`; the
comparison with rivals is `python -m benchmarks`.
"""

from __future__ import annotations

import pytest

from maml_cuda import FusedMAML

from .proof import prove, truth
from .rivals import clear, fused
from .workloads import WORKLOADS


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_meta_step(benchmark, name: str, order: int) -> None:
    build = fused("fused")
    small = WORKLOADS[name].shrunk()
    model, tasks = small.build()
    prove(build, small, model, tasks, order == 1, truth(small, model, tasks, order == 1))

    workload = WORKLOADS[name]
    model, tasks = workload.build()
    benchmark.group = name
    benchmark(build(workload, model, tasks, order == 1))


def test_through_autograd(benchmark) -> None:
    """A call and its `loss.backward()`, beside `maml.backward`, of the same group."""
    workload = WORKLOADS["sinusoid-k1"]
    model, tasks = workload.build()
    maml = FusedMAML(model, workload.inner_lr, workload.inner_steps, loss=workload.loss, backend="fused")
    parameters = list(model.parameters())

    def step() -> None:
        clear(parameters)
        maml(*tasks).loss.backward()

    benchmark.group = workload.name
    benchmark(step)

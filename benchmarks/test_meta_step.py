"""pytest-benchmark cases of our own meta-steps, to guard against regressions.

Run `pytest benchmarks --benchmark-only --benchmark-autosave`, and later again with `--benchmark-compare`; the
comparison with rivals is `python -m benchmarks`.
"""

from __future__ import annotations

import pytest

from .proof import prove, truth
from .rivals import Builder, fused
from .workloads import WORKLOADS


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_meta_step(benchmark, name: str, order: int) -> None:
    proven_and_timed(benchmark, fused("fused"), name, order)


@pytest.mark.parametrize("name", ["sinusoid-k1", "overhead"])
def test_through_autograd(benchmark, name: str) -> None:
    """In the group of `maml.backward`."""
    proven_and_timed(benchmark, fused("fused", through_autograd=True), name, 2)


def proven_and_timed(benchmark, build: Builder, name: str, order: int) -> None:
    small = WORKLOADS[name].shrunk()
    model, tasks = small.build()
    prove(build, small, model, tasks, order == 1, truth(small, model, tasks, order == 1))

    workload = WORKLOADS[name]
    model, tasks = workload.build()
    benchmark.group = name
    benchmark(build(workload, model, tasks, order == 1))

"""pytest-benchmark cases of the meta-steps of maml_cuda, to find regressions.

Run `pytest benchmarks --benchmark-only --benchmark-autosave` before a change, and with `--benchmark-compare` after it.
`python -m benchmarks` compares with the baselines.
"""

from __future__ import annotations

import pytest

from .meta_steps import Builder, fused
from .verification import reference_gradient, verify
from .workloads import WORKLOADS


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_meta_step(benchmark, name: str, order: int) -> None:
    verified_and_timed(benchmark, fused("fused"), name, order)


@pytest.mark.parametrize("name", ["sinusoid-k1", "overhead"])
def test_through_autograd(benchmark, name: str) -> None:
    """`maml(...).loss.backward()`, in one group with `maml.backward`."""
    verified_and_timed(benchmark, fused("fused", through_autograd=True), name, 2)


def verified_and_timed(benchmark, build: Builder, name: str, order: int) -> None:
    small = WORKLOADS[name].shrunk()
    model, tasks = small.build()
    verify(build, small, model, tasks, order == 1, reference_gradient(small, model, tasks, order == 1))

    workload = WORKLOADS[name]
    model, tasks = workload.build()
    benchmark.group = name
    benchmark(build(workload, model, tasks, order == 1))

"""The table of benchmarks.gpu: its cases, its targets, and how they are evaluated."""

from __future__ import annotations

import pytest

from benchmarks.gpu import (
    cases,
    table,
)
from tests.benchmarks.gpu_runs import MAML_CUDA

pytestmark = pytest.mark.usefixtures("one_thread")


def timed(method, precision, form, ms, peak=2**20):
    wall = {"q1": 0.9 * ms, "median": ms, "q3": 1.25 * ms}
    return {
        "method": method, "precision": precision, "form": form, "status": "timed", "ms": wall, "error": 1e-7,
        "peak_bytes": peak,
    }  # fmt: skip


def case_of(name, tasks, order, *found, baseline=None):
    shape = {"workload": name, "tasks": tasks, "order": order, "inner_steps": 1, "flops": 10**9 * order}
    named = {f"{s['method']} {s['precision']} {s['form']}": s for s in found}
    return {
        **shape,
        **({"baseline": baseline} if baseline else {}),
        "smooth": {"float32": 1e-7},
        "implementations": named,
    }


def test_table_evaluates_the_targets():
    found = {
        "settings": {"quick": False, "emulated": False},
        "machine": {"gpu": {"name": "NVIDIA Abacus", "multiprocessors": 8, "memory_gib": 2.0}, "torch": "2.9"},
        "parts": {"sanitizer": {"status": "skipped", "reason": "compute-sanitizer is not installed"}},
        "cases": dict(enumerate([
            case_of(
                "sinusoid-k1", 25, 2,
                timed(MAML_CUDA, "float32", "captured", 0.010), timed(MAML_CUDA, "float32", "graphs", 0.050),
                timed(MAML_CUDA, "bfloat16", "called", 0.020),
            ),
            case_of("sinusoid-k1", 25, 1, timed(MAML_CUDA, "float32", "captured", 0.002)),
            case_of(
                "sinusoid-k1", 25, 2, timed(MAML_CUDA, "float32", "captured", 0.02),
                timed("torch.compile", "float32", "called", 0.08), baseline="torch.compile",
            ),
            case_of(
                "sinusoid-k1", 25, 2, timed(MAML_CUDA, "float32", "captured", 0.01),
                timed("loop", "float32", "called", 0.01) | {"unverified": "wrong"}, baseline="loop",
            ),
            case_of("policy", 20, 2, timed(MAML_CUDA, "float32", "called", 0.5)),
            case_of("sinusoid-k5", 25, 2, timed(MAML_CUDA, "float32", "called", 0.001) | {"unverified": "wrong"}),
        ])),
    }  # fmt: skip
    text = table.markdown(found)
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    fused, reduced, first, policy, unverified = rows
    assert fused[:5] == ["sinusoid-k1", "25", "1", "2", "float32"]
    assert fused[5:8] == ["0.01 (0.009 to 0.0125) captured", "0.05 (0.045 to 0.0625)", "200"]  # TFLOP/s
    assert fused[8:10] == [
        "0.08 (0.072 to 0.1) torch.compile, called",
        "4.0x",
    ]  # relative to maml_cuda in the same rounds
    assert fused[-1] == "0.012 ms met; 5x **missed**"
    assert reduced[8:10] == ["", ""]
    assert first[-1] == ""
    assert unverified[5] == "0.001 (0.0009 to 0.00125) called **unverified**"
    assert unverified[-1] == "not evaluated: unverified"
    assert policy[-1] == "0.25 ms **missed**; 5x not evaluated: no baseline timed"
    assert any("sinusoid-k1 T=25 float32: time 5.00, FLOP 2.00, 2.50x" in x and "**missed**" in x for x in lines)
    assert "- Target not evaluated: omniglot T=32, 0.75 ms in tf32: not timed." in lines
    assert "- Step sanitizer skipped: compute-sanitizer is not installed" in lines
    assert lines[0].endswith("on: NVIDIA Abacus, 8 multiprocessors, 2.0 GiB, torch 2.9.")


def test_the_cases_include_the_targets_and_have_unique_names():
    found = cases.cases(quick=False, emulated=False)
    assert set(table.TARGETS) <= {(case.workload_name, case.tasks) for case in found if case.order == 2}
    assert len(found) == len({case.name for case in found}) == 18
    assert all(case.workload().tasks == case.tasks for case in found)
    assert [case.order for case in found] == [2] * 9 + [1] * 9
    assert cases.Case("omniglot", 32, 2, small=True).workload().tasks == 2
    asked = cases.cases(quick=False, emulated=False, names=["policy-t20", "omniglot-t4"])
    assert [case.name for case in asked] == ["omniglot-t4", "policy-t20"]
    assert set(cases.PROFILED) <= {case.name for case in found}

"""The verification of benchmarks.gpu: wrong results are marked and have no ratio."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from benchmarks import workloads
from benchmarks.gpu import (
    cases,
    facts,
    fused,
    implementations,
    jax_meta_step,
    machine,
    record,
    smallest,
    verification,
)
from tests.benchmarks.gpu_runs import (
    MAML_CUDA,
    SINUSOID,
    change_gradient,
    measured,
    statuses_of,
    table_of,
    with_baseline,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_wrong_float32_gradient_is_timed_and_marked(monkeypatch):
    off = 1 + 1e-5  # far above float32 rounding
    change_gradient(
        monkeypatch, lambda dtype, precision: off if (dtype, precision) == (torch.float32, "float32") else 1
    )
    found = measured()
    assert set(statuses_of(found).values()) == {"timed"}
    unverified = {result["precision"] for result in found["implementations"].values() if "unverified" in result}
    assert unverified == {"float32"}
    text = table_of(fused=found)
    assert sum("**unverified**" in line for line in text.splitlines()) == 1
    assert "unverified: float32 on the smooth variant must be within" in text


@pytest.mark.usefixtures("emulation", "few_rounds")
@pytest.mark.parametrize("factor", [1 + 1e-8, float("nan")])
def test_a_wrong_float64_gradient_makes_all_results_unverified(factor, monkeypatch):
    change_gradient(monkeypatch, lambda dtype, precision: factor if dtype == torch.float64 else 1)
    found = measured()
    assert "float64 must be within 1e-10 of the reference" in found["float64"]["failed"]
    assert set(statuses_of(found).values()) == {"timed"}
    assert all("float64 must be within" in result["unverified"] for result in found["implementations"].values())


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_timing_comes_before_verification(monkeypatch):
    """A verification that takes all the time that is left costs no times."""
    monkeypatch.setattr(fused, "reference_gradient", lambda *_: pytest.fail("the verification began"))
    found = {}

    def gather():
        for piece in fused.measure(SINUSOID, 1e-4):
            record.merge(found, piece)

    with pytest.raises(pytest.fail.Exception, match="the verification began"):
        gather()
    assert set(statuses_of(found).values()) == {"timed"}


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_baseline_that_is_wrong_or_fails_has_no_ratio(monkeypatch):
    def failing(*_):
        raise RuntimeError("a planted error")

    def zero(workload, model, tasks, first_order):
        return lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()]

    monkeypatch.setattr(implementations, "autograd_loop", failing)
    monkeypatch.setattr(implementations, "func_vmap", zero)
    loop, vmap = with_baseline("autograd loop"), with_baseline("torch.func vmap")
    assert loop["implementations"]["autograd loop float32 called"]["reason"] == "RuntimeError: a planted error"
    assert (
        "on the smooth variant must be within"
        in vmap["implementations"]["torch.func vmap float32 called"]["unverified"]
    )
    for found in (loop, vmap):
        assert found["implementations"][f"{MAML_CUDA} float32 called"]["status"] == "timed"
        assert "unverified" not in found["implementations"][f"{MAML_CUDA} float32 called"]
    text = table_of(fused=measured(), loop=loop, vmap=vmap)
    assert "torch.func vmap, called" not in text
    assert "- vmap: torch.func vmap float32 called unverified: torch.func vmap on the smooth variant must be" in text
    assert "- loop: autograd loop float32 called not timed: failed: RuntimeError: a planted error" in text


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_first_order_baseline_fails_verification_at_second_order(monkeypatch):
    right = implementations.func_vmap
    monkeypatch.setattr(
        implementations, "func_vmap", lambda workload, model, tasks, _: right(workload, model, tasks, True)
    )
    assert "unverified" in with_baseline("torch.func vmap")["implementations"]["torch.func vmap float32 called"]
    assert "unverified" not in with_baseline("autograd loop")["implementations"]["autograd loop float32 called"]


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_captured_steps_count_once_each(monkeypatch):
    """Simulates CUDA graphs, which the emulation lacks, by repeating the steps."""
    device = machine.machine(True)
    monkeypatch.setattr(device, "has_graphs", True, raising=False)
    monkeypatch.setattr(device, "capture", lambda step, copies: lambda: [step() for _ in range(copies)], raising=False)
    found = measured()["implementations"]
    assert len(found) == 3 * len(implementations.PRECISIONS)
    assert {result["status"] for result in found.values()} == {"timed"}
    called, captured = (found[f"{MAML_CUDA} float32 {form}"]["ms"]["median"] for form in ("called", "captured"))
    assert captured < 4 * called  # the time of one step, not of the eight in a graph
    assert {
        result["form"]
        for result in with_baseline("autograd loop")["implementations"].values()
        if result["method"] != MAML_CUDA
    } == {
        "called",
        "captured",
    }
    names = [name for piece in facts.facts(True) for name in piece if name != "say"]
    assert {"graph launch", "graph node", "overhead, captured"} <= set(names)
    found = cases.baseline_jobs(cases.cases(quick=False, emulated=False), device)
    assert found[0] == cases.Job(cases.Case("omniglot", 4, 2), "torch.func vmap", "tf32", 40)
    assert len(found) == len(set(found))
    method = {(job.case.name, job.method) for job in found}
    for case in cases.cases(quick=False, emulated=False):
        assert {(case.name, "torch.func vmap"), (case.name, "autograd loop")} <= method
        assert ((case.name, "torch.compile") in method) == (case.order == 2)


@pytest.mark.usefixtures("emulation")
def test_the_smallest_meta_steps_run():
    assert smallest.meta_steps(torch.device("cpu")) == 2 * len(implementations.PRECISIONS)


@pytest.mark.parametrize("name", sorted({name for name, _ in cases.WORKLOADS_AND_TASKS}))
def test_the_smooth_variant_is_smooth(name):
    model, tasks = workloads.WORKLOADS[name].shrunk().build()
    variant = verification.smooth(model)
    graph = fx.symbolic_trace(variant).graph
    assert not any(node.target in verification.SMOOTH_FUNCTIONS for node in graph.nodes if node.op == "call_function")
    assert not any(isinstance(module, torch.nn.ReLU) for module in variant.modules())
    assert [n for n, _ in variant.named_parameters()] == [n for n, _ in model.named_parameters()]
    x = tasks.x_spt[0]
    assert variant(x).shape == model(x).shape
    assert not torch.equal(variant(x), model(x))


def test_jax_has_the_same_gradient():
    pytest.importorskip("jax")
    workload = cases.TINY["sinusoid-k1"]
    for first_order in (False, True):
        model, tasks = workload.build()
        step = jax_meta_step.builder("float32")(workload, model, tasks, first_order)
        step()
        step.wait()
        step.copy_gradient()
        assert (
            verification.distance(
                verification.gradients(model), verification.reference_gradient(workload, model, tasks, first_order)
            )
            < 1e-6
        )

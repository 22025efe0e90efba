"""benchmarks.gpu checks every answer before its time counts: wrong ones are marked and enter no ratio."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from benchmarks import workloads
from benchmarks.gpu import (
    cases,
    facts,
    jax_rival,
    machine,
    ours,
    proof,
    record,
    sides,
    smallest,
)
from tests.benchmarks.gpu_runs import OURS, SINUSOID, beside, measured, spoil, statuses_of, table_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_wrong_float32_answer_is_timed_and_marked(monkeypatch):
    off = 1 + 1e-5  # ten units of float32 rounding
    spoil(monkeypatch, lambda dtype, precision: off if (dtype, precision) == (torch.float32, "float32") else 1)
    found = measured()
    assert set(statuses_of(found).values()) == {"timed"}
    unproven = {side["precision"] for side in found["sides"].values() if "unproven" in side}
    assert unproven == {"float32"}
    text = table_of(ours=found)
    assert sum("**unproven**" in line for line in text.splitlines()) == 1
    assert "unproven: float32 on the smooth twin must be within" in text


@pytest.mark.usefixtures("emulation", "few_rounds")
@pytest.mark.parametrize("factor", [1 + 1e-8, float("nan")])
def test_a_wrong_float64_answer_leaves_all_of_ours_unproven(factor, monkeypatch):
    spoil(monkeypatch, lambda dtype, precision: factor if dtype == torch.float64 else 1)
    found = measured()
    assert "float64 must be within 1e-10 of the reference" in found["float64"]["refused"]
    assert set(statuses_of(found).values()) == {"timed"}
    assert all("float64 must be within" in side["unproven"] for side in found["sides"].values())


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_times_are_there_before_the_proof(monkeypatch):
    """A proof that takes all the time that is left costs no times."""
    monkeypatch.setattr(ours, "truth", lambda *_: pytest.fail("the proof began"))
    found = {}

    def gather():
        for piece in ours.measure(SINUSOID, 1e-4):
            record.merge(found, piece)

    with pytest.raises(pytest.fail.Exception, match="the proof began"):
        gather()
    assert set(statuses_of(found).values()) == {"timed"}


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_rival_that_is_wrong_or_fails_enters_no_ratio(monkeypatch):
    def failing(*_):
        raise RuntimeError("out of luck")

    def zero(workload, model, tasks, first_order):
        return lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()]

    monkeypatch.setattr(sides, "autograd_loop", failing)
    monkeypatch.setattr(sides, "func_vmap", zero)
    loop, vmap = beside("autograd loop"), beside("torch.func vmap")
    assert loop["sides"]["autograd loop float32 called"]["reason"] == "RuntimeError: out of luck"
    assert "on the smooth twin must be within" in vmap["sides"]["torch.func vmap float32 called"]["unproven"]
    for found in (loop, vmap):
        assert found["sides"][f"{OURS} float32 called"]["status"] == "timed"
        assert "unproven" not in found["sides"][f"{OURS} float32 called"]
    text = table_of(ours=measured(), loop=loop, vmap=vmap)
    assert "torch.func vmap, called" not in text
    assert "- vmap: torch.func vmap float32 called unproven: torch.func vmap on the smooth twin must be" in text
    assert "- loop: autograd loop float32 called not timed: failed: RuntimeError: out of luck" in text


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_first_order_rival_is_no_second_order_one(monkeypatch):
    right = sides.func_vmap
    monkeypatch.setattr(sides, "func_vmap", lambda workload, model, tasks, _: right(workload, model, tasks, True))
    assert "unproven" in beside("torch.func vmap")["sides"]["torch.func vmap float32 called"]
    assert "unproven" not in beside("autograd loop")["sides"]["autograd loop float32 called"]


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_captured_steps_count_each(monkeypatch):
    """With graphs that only repeat their steps: all that the GPU has and the emulation has not."""
    on = machine.machine(True)
    monkeypatch.setattr(on, "has_graphs", True, raising=False)
    monkeypatch.setattr(on, "capture", lambda step, copies: lambda: [step() for _ in range(copies)], raising=False)
    found = measured()["sides"]
    assert len(found) == 3 * len(sides.PRECISIONS)
    assert {side["status"] for side in found.values()} == {"timed"}
    called, captured = (found[f"{OURS} float32 {form}"]["ms"]["median"] for form in ("called", "captured"))
    assert captured < 4 * called  # a step's time, not that of the eight in the graph
    assert {side["form"] for side in beside("autograd loop")["sides"].values() if side["who"] != OURS} == {
        "called",
        "captured",
    }
    names = [name for piece in facts.facts(True) for name in piece if name != "say"]
    assert {"graph launch", "graph node", "overhead, captured"} <= set(names)
    found = cases.rival_jobs(cases.cases(quick=False, emulated=False), on)
    assert found[0] == cases.Job(cases.Case("omniglot", 4, 2), "torch.func vmap", "tf32", 40)
    assert len(found) == len(set(found))
    who = {(job.case.name, job.who) for job in found}
    for case in cases.cases(quick=False, emulated=False):
        assert {(case.name, "torch.func vmap"), (case.name, "autograd loop")} <= who
        assert ((case.name, "torch.compile") in who) == (case.order == 2)


@pytest.mark.usefixtures("emulation")
def test_the_smallest_meta_steps_run():
    assert smallest.meta_steps(torch.device("cpu")) == 2 * len(sides.PRECISIONS)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_the_smooth_twin_has_no_kink(name):
    model, tasks = workloads.WORKLOADS[name].shrunk().build()
    twin = proof.smooth(model)
    graph = fx.symbolic_trace(twin).graph
    assert not any(node.target in proof.SMOOTH_FUNCTIONS for node in graph.nodes if node.op == "call_function")
    assert not any(isinstance(module, torch.nn.ReLU) for module in twin.modules())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    x = tasks.x_spt[0]
    assert twin(x).shape == model(x).shape
    assert not torch.equal(twin(x), model(x))


def test_jax_has_the_same_gradient():
    pytest.importorskip("jax")
    workload = cases.TINY["sinusoid-k1"]
    for first_order in (False, True):
        model, tasks = workload.build()
        step = jax_rival.builder("float32")(workload, model, tasks, first_order)
        step()
        step.wait()
        step.copy_gradient()
        assert proof.distance(proof.gradients(model), proof.truth(workload, model, tasks, first_order)) < 1e-6

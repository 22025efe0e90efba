"""The command for a GPU, on the emulated kernels: it proves, refuses, goes on after failures, and keeps to its time."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import fx

from benchmarks import files, worker, workloads
from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import (
    cases,
    check,
    facts,
    jax_rival,
    machine,
    matrix,
    parts,
    proof,
    record,
    sides,
    smallest,
    table,
)

SINUSOID = cases.Case("sinusoid-k1", 2, 2, emulated=True)
OURS = sides.OURS


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small gain nothing from more, and lose much where another process has the other core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulation():
    with machine.emulation():
        yield


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(matrix, "ROUNDS", 2)
    monkeypatch.setattr(matrix, "BURST", 1e-4)
    monkeypatch.setattr(facts, "REPEATS", 1)


def measured(case=SINUSOID):
    found = {}
    for piece in matrix.measure(case, 1e-4):
        piece.pop("say", None)
        record.merge(found, piece)
    return found


def test_command(tmp_path, few_rounds, capsys):
    assert cli.main(["--emulated", "--quick", "--seconds", "0.0001", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emulated-gpu.json", "emulated-gpu.md"]
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    assert statuses == {
        "describe": "done",
        "build": "skipped",
        "tests": "done",
        "sanitizer": "skipped",
        "facts": "done",
        "precision": "done",
        "matrix": "done",
    }
    assert found["tests"]["counts"]["passed"] > 0
    assert all(fact["value"] > 0 for fact in found["facts"].values())
    assert [(case["workload"], case["order"], case["executor"]) for case in found["cases"]] == [
        ("sinusoid-k1", 2, "megakernel"),
        ("sinusoid-k1", 1, "megakernel"),
        ("omniglot", 2, "batched"),
        ("omniglot", 1, "batched"),
    ]
    for case in found["cases"]:
        assert case["float64"]["error"] <= 1e-10
        assert set(case["smooth"]) == {"reference", *sides.PRECISIONS, "autograd loop", "torch.func vmap"}
        assert case["smooth"]["float32"] <= 2 * case["smooth"]["reference"] + proof.SLACK
        assert {(s["who"], s["precision"], s["form"]) for s in case["sides"].values()} == {
            *((OURS, precision, form) for precision in sides.PRECISIONS for form in ("called", "graphs")),
            ("autograd loop", "float32", "called"),
            ("torch.func vmap", "float32", "called"),
        }
        for side in case["sides"].values():
            assert side["status"] == "timed"
            assert 0 < side["ms"]["q1"] <= side["ms"]["median"] <= side["ms"]["q3"]
    batched = found["cases"][2]["smooth"]
    assert batched["float32"] < batched["bf16x3"] < batched["tf32"] < batched["bfloat16"]

    text = (tmp_path / "emulated-gpu.md").read_text()
    assert text == table.markdown(found) + "\n"
    assert text in capsys.readouterr().out
    assert "**Emulated on a CPU: it shows that the command works, its times mean nothing.**" in text
    by_precision = found["precision"]["omniglot"]["errors"]
    assert list(by_precision) == list(sides.PRECISIONS)
    assert by_precision["float32"]["smooth"] < by_precision["bf16x3"]["smooth"] < by_precision["tf32"]["smooth"]
    assert by_precision["bfloat16"]["decisions"] > by_precision["bfloat16"]["flips"] >= 0
    lines = text.splitlines()
    assert sum(line.startswith("| omniglot, T = 2 | `") for line in lines) == len(sides.PRECISIONS)
    rows = [line for line in lines if line.startswith("| ") and "`" not in line and "| net |" not in line]
    rows.pop()  # the rule under the second table's head
    assert len(rows) == 2 + 4 * len(sides.PRECISIONS)
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert "met" not in "".join(rows[2:])  # an emulated time is no target's


def spoil(monkeypatch, wrong):
    """Ours, with a gradient that is off by a factor of `wrong(dtype, precision)`."""
    right = sides.ours

    def ours(precision, cuda_graphs):
        def build(workload, model, tasks, first_order):
            step = right(precision, cuda_graphs)(workload, model, tasks, first_order)

            def spoiled():
                step()
                for p in model.parameters():
                    p.grad = p.grad * wrong(p.dtype, precision)

            return spoiled

        return build

    monkeypatch.setattr(sides, "ours", ours)
    monkeypatch.setattr(proof, "ours", ours)


def statuses_of(found):
    return {(side["who"], side["precision"]): side["status"] for side in found["sides"].values()}


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_wrong_float32_answer_is_refused(monkeypatch):
    off = 1 + 1e-5  # ten units of float32 rounding
    spoil(monkeypatch, lambda dtype, precision: off if (dtype, precision) == (torch.float32, "float32") else 1)
    found = measured()
    statuses = statuses_of(found)
    assert statuses[OURS, "float32"] == "refused"
    assert statuses[OURS, "bf16x3"] == statuses[OURS, "tf32"] == statuses["autograd loop", "float32"] == "timed"
    assert not any("ms" in side for side in found["sides"].values() if side["status"] != "timed")
    run_record = {"settings": {"quick": False, "emulated": False}, "machine": {}, "parts": {}, "cases": [found]}
    text = table.markdown(run_record)
    assert "| float32 | **refused** |" in text
    assert "refused: float32 on the smooth twin must be within" in text


@pytest.mark.usefixtures("emulation", "few_rounds")
@pytest.mark.parametrize("factor", [1 + 1e-8, float("nan")])
def test_a_wrong_float64_answer_refuses_all_of_ours(factor, monkeypatch):
    spoil(monkeypatch, lambda dtype, precision: factor if dtype == torch.float64 else 1)
    found = measured()
    assert "float64 must be within 1e-10 of the reference" in found["float64"]["refused"]
    assert {status for (who, _), status in statuses_of(found).items() if who == OURS} == {"refused"}
    assert {status for (who, _), status in statuses_of(found).items() if who != OURS} == {"timed"}


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_rival_that_is_wrong_or_fails_is_not_timed(monkeypatch):
    def failing(*_):
        raise RuntimeError("out of luck")

    def zero(workload, model, tasks, first_order):
        return lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()]

    monkeypatch.setattr(sides, "autograd_loop", failing)
    monkeypatch.setattr(sides, "func_vmap", zero)
    found = measured()["sides"]
    assert found["autograd loop float32 called"]["reason"] == "RuntimeError: out of luck"
    assert found["torch.func vmap float32 called"]["status"] == "refused"
    assert found[f"{OURS} float32 called"]["status"] == "timed"


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_a_first_order_rival_is_no_second_order_one(monkeypatch):
    right = sides.func_vmap
    monkeypatch.setattr(sides, "func_vmap", lambda workload, model, tasks, _: right(workload, model, tasks, True))
    found = measured()["sides"]
    assert found["torch.func vmap float32 called"]["status"] == "refused"
    assert found["autograd loop float32 called"]["status"] == "timed"


@pytest.mark.usefixtures("emulation", "few_rounds")
def test_captured_steps_count_each(monkeypatch):
    """With graphs that only repeat their steps: all that the GPU has and the emulation has not."""
    on = machine.machine(True)
    monkeypatch.setattr(on, "has_graphs", True, raising=False)
    monkeypatch.setattr(on, "capture", lambda step, copies: lambda: [step() for _ in range(copies)], raising=False)
    found = measured()["sides"]
    assert len(found) == 3 * len(sides.PRECISIONS) + 2 * 4
    assert {side["status"] for side in found.values()} == {"timed"}
    called, captured = (found[f"{OURS} float32 {form}"]["ms"]["median"] for form in ("called", "captured"))
    assert captured < 4 * called  # a step's time, not that of the eight in the graph
    names = [name for piece in facts.facts(True) for name in piece if name != "say"]
    assert {"graph launch", "graph node", "overhead, captured"} <= set(names)


def test_a_failing_part_is_recorded_and_the_rest_goes_on(tmp_path, few_rounds, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(check, "tests", failing)
    monkeypatch.setattr(facts, "launch", failing)
    monkeypatch.setattr(parts, "cases", lambda quick, emulated: ([SINUSOID], []))
    assert cli.main(["--emulated", "--quick", "--seconds", "0.0001", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert found["parts"]["tests"]["status"] == "failed"
    assert found["parts"]["tests"]["reason"] == "RuntimeError: no luck today"
    assert found["facts"]["launch"] == {"failed": "RuntimeError: no luck today"}
    assert found["facts"]["copy"]["value"] > 0
    assert found["parts"]["matrix"]["status"] == "done"
    assert found["cases"][0]["sides"][f"{OURS} float32 called"]["status"] == "timed"
    text = capsys.readouterr().out
    assert "- Part tests failed: RuntimeError: no luck today" in text
    assert "- launch: not measured: RuntimeError: no luck today" in text


def test_what_finds_no_time_left_says_so(tmp_path, few_rounds, capsys):
    begin = time.monotonic()
    assert cli.main(["--emulated", "--quick", "--out", str(tmp_path)], minutes=cli.RESERVE / 60) == 1
    assert time.monotonic() - begin < 5
    assert "Part describe skipped: no time was left for it" in capsys.readouterr().out

    run = record.Run({"quick": True, "emulated": True, "seconds": 1e-4}, tmp_path, 100.0)
    with pytest.raises(worker.Failed, match="no time was left for sinusoid-k1, T=2, order 2; sinusoid-k1"):
        parts.matrix(run, 0.5)


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


def timed(who, precision, form, ms, peak=2**20):
    wall = {"q1": 0.9 * ms, "median": ms, "q3": 1.25 * ms}
    return {
        "who": who, "precision": precision, "form": form, "status": "timed", "ms": wall, "error": 1e-7,
        "peak_bytes": peak,
    }  # fmt: skip


def case_of(name, tasks, order, *found, compiled=False):
    shape = {"workload": name, "tasks": tasks, "order": order, "inner_steps": 1, "flops": 10**9 * order}
    named = {f"{s['who']} {s['precision']} {s['form']}": s for s in found}
    return {**shape, "compiled": compiled, "smooth": {"float32": 1e-7}, "sides": named}


def test_table_judges_the_targets():
    found = {
        "settings": {"quick": False, "emulated": False},
        "machine": {"gpu": {"name": "NVIDIA Abacus", "multiprocessors": 8, "memory_gib": 2.0}, "torch": "2.9"},
        "parts": {"sanitizer": {"status": "skipped", "reason": "compute-sanitizer is not installed"}},
        "cases": [
            case_of(
                "sinusoid-k1", 25, 2,
                timed(OURS, "float32", "captured", 0.010), timed(OURS, "float32", "graphs", 0.050),
                timed(OURS, "bfloat16", "called", 0.020), timed("loop", "float32", "called", 9.0),
            ),
            case_of("sinusoid-k1", 25, 1, timed(OURS, "float32", "captured", 0.002)),
            case_of(
                "sinusoid-k1", 25, 2, timed(OURS, "float32", "captured", 0.02),
                timed("torch.compile", "float32", "called", 0.08), compiled=True,
            ),
            case_of("policy", 20, 2, timed(OURS, "float32", "called", 0.5)),
        ],
    }  # fmt: skip
    text = table.markdown(found)
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    ours, reduced, first, policy = rows
    assert ours[:5] == ["sinusoid-k1", "25", "1", "2", "float32"]
    assert ours[5:8] == ["0.01 (0.009 to 0.0125) captured", "0.05 (0.045 to 0.0625)", "200"]  # TFLOP/s
    assert ours[8:10] == ["0.08 (0.072 to 0.1) torch.compile, called", "4.0x"]  # against ours of the same rounds
    assert ours[-1] == "0.012 ms met; 5x **missed**"
    assert reduced[8:10] == ["", ""]
    assert first[-1] == ""
    assert policy[-1] == "0.25 ms **missed**; 5x not judged: no rival timed"
    assert any("sinusoid-k1 T=25 float32: time 5.00, FLOP 2.00, 2.50x" in x and "**missed**" in x for x in lines)
    assert "- Target not judged: omniglot T=32, 0.75 ms in tf32: not timed." in lines
    assert "- Part sanitizer skipped: compute-sanitizer is not installed" in lines
    assert lines[0].endswith("on: NVIDIA Abacus, 8 multiprocessors, 2.0 GiB, torch 2.9.")


def test_the_cases_are_those_of_the_issue():
    targeted, others = cases.cases(quick=False, emulated=False)
    both = targeted + others
    assert {(case.name, case.tasks) for case in targeted} == set(table.TARGETS)
    assert len(both) == len(set(both)) == 18
    assert all(case.workload().tasks == case.tasks for case in both)
    assert cases.Case("omniglot", 32, 2, small=True).workload().tasks == 2


def test_slug():
    assert files.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(("arguments", "message"), [(["--seconds", "0"], "--seconds must be above 0, got 0.0")])
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err

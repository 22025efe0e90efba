"""The command for a GPU, on the emulated kernels: it proves, refuses, goes on after failures, and keeps to its time."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from torch import fx

from benchmarks import files, worker, workloads
from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import (
    cases,
    check,
    entrants,
    facts,
    jax_rival,
    machine,
    ours,
    parts,
    profile,
    proof,
    record,
    rivals,
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
    monkeypatch.setattr(entrants, "ROUNDS", 2)
    monkeypatch.setattr(entrants, "BURST", 1e-4)
    monkeypatch.setattr(facts, "REPEATS", 1)
    monkeypatch.setattr(profile, "STEPS", 1)


def gathered(pieces):
    found = {}
    for piece in pieces:
        piece.pop("say", None)
        record.merge(found, piece)
    return found


def measured(case=SINUSOID):
    return gathered(ours.measure(case, 1e-4))


def beside(who, case=SINUSOID):
    return gathered(rivals.measure(cases.Job(case, who, "float32", 60), 1e-4))


def options_of(folder, *more):
    return cli.parse(["--emulated", "--quick", "--out", str(folder), *more])


def test_command(tmp_path, few_rounds, monkeypatch, capsys):
    monkeypatch.setattr(record.Run, "SIDE_SECONDS", (1e-4, 1e-4))
    names = ["sinusoid-k1-t2", "omniglot-t2-first-order"]
    arguments = ["--emulated", "--quick", "--out", str(tmp_path), "--parts", ",".join(parts.PARTS)]
    assert cli.main([*arguments, "--cases", ",".join(names)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emulated-gpu.json", "emulated-gpu.md"]
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    skipped = {"build", "memcheck", "nsight"}
    assert statuses == {step.name: "skipped" if step.name in skipped else "done" for step in parts.STEPS}
    assert found["smallest"]["meta_steps"] == 2 * len(sides.PRECISIONS)
    assert found["tests"]["counts"]["passed"] > 0
    assert all(fact["value"] > 0 for fact in found["facts"].values())

    theirs = [f"{name}: {who} float32" for who in ("torch.func vmap", "autograd loop") for name in names]
    assert list(found["cases"]) == [*(f"{name}: ours" for name in names), *theirs]
    for name in names:
        case = found["cases"][f"{name}: ours"]
        assert case["executor"] == ("megakernel" if "sinusoid" in name else "batched")
        assert case["float64"]["error"] <= 1e-10
        assert set(case["smooth"]) == {"reference", *sides.PRECISIONS}
        assert case["smooth"]["float32"] <= 2 * case["smooth"]["reference"] + proof.SLACK
        assert {(s["who"], s["precision"], s["form"]) for s in case["sides"].values()} == {
            (OURS, precision, form) for precision in sides.PRECISIONS for form in ("called", "graphs")
        }
    for name in theirs:
        case = found["cases"][name]
        assert set(case["smooth"]) == {"reference", case["rival"]}
        forms = [f"{OURS} float32 called", f"{OURS} float32 graphs", f"{case['rival']} float32 called"]
        assert sorted(case["sides"]) == sorted(forms)
    for case in found["cases"].values():
        for side in case["sides"].values():
            assert side["status"] == "timed"
            assert "unproven" not in side
            assert 0 < side["ms"]["q1"] <= side["ms"]["median"] <= side["ms"]["q3"]
    batched = found["cases"]["omniglot-t2-first-order: ours"]["smooth"]
    assert batched["float32"] < batched["bf16x3"] < batched["tf32"] < batched["bfloat16"]
    assert list(found["kernels"]) == names
    by_precision = found["kernels"]["sinusoid-k1-t2"]
    assert by_precision["float32"].keys() == by_precision["tf32"].keys()  # the megakernel knows float32 alone
    for precisions in found["kernels"].values():
        for kernels in precisions.values():
            times = [kernel["us"] for kernel in kernels.values()]
            assert times == sorted(times, reverse=True)
            assert all(kernel["launches"] >= 1 for kernel in kernels.values())

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
    assert "| `megakernel<float>` | 1 |" in text
    rows = [line for line in lines if line.startswith(("| sinusoid-k1 |", "| omniglot |"))]
    assert len(rows) == 2 * len(sides.PRECISIONS)
    assert sum("autograd loop, called" in row or "vmap, called" in row for row in rows) == 2
    assert "met" not in "".join(rows)  # an emulated time is no target's


def spoil(monkeypatch, wrong):
    """Ours, with a gradient that is off by a factor of `wrong(dtype, precision)`."""
    right = sides.ours

    def spoiled_ours(precision, cuda_graphs):
        def build(workload, model, tasks, first_order):
            step = right(precision, cuda_graphs)(workload, model, tasks, first_order)

            def spoiled():
                step()
                for p in model.parameters():
                    p.grad = p.grad * wrong(p.dtype, precision)

            return spoiled

        return build

    for module in (sides, proof, ours):
        monkeypatch.setattr(module, "ours", spoiled_ours)


def statuses_of(found):
    return {(side["who"], side["precision"]): side["status"] for side in found["sides"].values()}


def table_of(**found):
    settings = {"quick": False, "emulated": False}
    return table.markdown({"settings": settings, "machine": {}, "parts": {}, "cases": found})


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


def test_a_failing_part_is_recorded_and_the_rest_goes_on(tmp_path, few_rounds, monkeypatch, capsys):
    def failing(*_, **__):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(record.Run, "SIDE_SECONDS", (1e-4, 1e-4))
    monkeypatch.setattr(check, "tests", failing)
    monkeypatch.setattr(facts, "launch", failing)
    arguments = ["--emulated", "--quick", "--out", str(tmp_path), "--cases", "sinusoid-k1-t2"]
    assert cli.main([*arguments, "--parts", "smoke,ours"]) == 1
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert found["parts"]["tests"]["status"] == "failed"
    assert found["parts"]["tests"]["reason"] == "RuntimeError: no luck today"
    assert found["facts"]["launch"] == {"failed": "RuntimeError: no luck today"}
    assert found["facts"]["copy"]["value"] > 0
    assert found["parts"]["ours"]["status"] == "done"
    assert found["cases"]["sinusoid-k1-t2: ours"]["sides"][f"{OURS} float32 called"]["status"] == "timed"
    text = capsys.readouterr().out
    assert "- Step tests failed: RuntimeError: no luck today" in text
    assert "- launch: not measured: RuntimeError: no luck today" in text

    # A wrong answer of an earlier run is no failure of a later one, either.
    side = found["cases"]["sinusoid-k1-t2: ours"]["sides"][f"{OURS} float32 called"]
    side["unproven"] = "wrong"
    (tmp_path / "emulated-gpu.json").write_text(json.dumps(found))

    # What one run has found stays when the next one adds to it, and what had failed there is no failure of this one.
    assert cli.main([*arguments, "--parts", "profile"]) == 0
    both = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert both["cases"] == found["cases"]
    assert both["parts"]["tests"] == found["parts"]["tests"]
    assert both["parts"]["kernels"]["status"] == "done"


def test_what_finds_no_time_left_says_so(tmp_path, capsys, few_rounds, monkeypatch):
    run = record.Run(options_of(tmp_path))
    with pytest.raises(worker.Stopped, match="no time was left for all of sinusoid-k1-t2: ours; omniglot-t2: ours"):
        parts.ours(run, 0.5)
    monkeypatch.setattr(record, "RESERVE", 600.0)
    begin = time.monotonic()
    assert cli.main(["--emulated", "--quick", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 5
    assert "Step describe skipped: no time was left for it" in capsys.readouterr().out


def test_facts_are_written_as_they_come(tmp_path, monkeypatch):
    def one(*_):
        yield {"launch": {"value": 1.0, "unit": "us", "of": "a kernel"}}
        raise worker.Stopped("stopped after its 7 seconds")

    monkeypatch.setattr(facts, "facts", one)
    run = record.Run(options_of(tmp_path))
    run.record["machine"] = {"gpu": {"name": "Abacus"}}
    with pytest.raises(worker.Stopped):
        parts.facts(run, 10)
    assert json.loads((tmp_path / "abacus.json").read_text())["facts"]["launch"]["value"] == 1.0
    assert "- launch: 1 us (a kernel)." in (tmp_path / "abacus.md").read_text()


def test_a_time_out_is_no_failure(tmp_path, few_rounds, monkeypatch):
    def late(*_):
        raise worker.Stopped("stopped after its 7 seconds")
        yield

    monkeypatch.setattr(record.Run, "SIDE_SECONDS", (1e-4, 1e-4))
    monkeypatch.setattr(ours, "measure", late)
    arguments = ["--emulated", "--quick", "--out", str(tmp_path), "--cases", "sinusoid-k1-t2", "--parts", "ours"]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert found["cases"] == {"sinusoid-k1-t2: ours": {"stopped": "stopped after its 7 seconds"}}
    assert found["parts"]["ours"]["status"] == "stopped"
    assert "- Not at its end: sinusoid-k1-t2: ours: stopped after" in (tmp_path / "emulated-gpu.md").read_text()


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


def case_of(name, tasks, order, *found, rival=None):
    shape = {"workload": name, "tasks": tasks, "order": order, "inner_steps": 1, "flops": 10**9 * order}
    named = {f"{s['who']} {s['precision']} {s['form']}": s for s in found}
    return {**shape, **({"rival": rival} if rival else {}), "smooth": {"float32": 1e-7}, "sides": named}


def test_table_judges_the_targets():
    found = {
        "settings": {"quick": False, "emulated": False},
        "machine": {"gpu": {"name": "NVIDIA Abacus", "multiprocessors": 8, "memory_gib": 2.0}, "torch": "2.9"},
        "parts": {"sanitizer": {"status": "skipped", "reason": "compute-sanitizer is not installed"}},
        "cases": dict(enumerate([
            case_of(
                "sinusoid-k1", 25, 2,
                timed(OURS, "float32", "captured", 0.010), timed(OURS, "float32", "graphs", 0.050),
                timed(OURS, "bfloat16", "called", 0.020),
            ),
            case_of("sinusoid-k1", 25, 1, timed(OURS, "float32", "captured", 0.002)),
            case_of(
                "sinusoid-k1", 25, 2, timed(OURS, "float32", "captured", 0.02),
                timed("torch.compile", "float32", "called", 0.08), rival="torch.compile",
            ),
            case_of(
                "sinusoid-k1", 25, 2, timed(OURS, "float32", "captured", 0.01),
                timed("loop", "float32", "called", 0.01) | {"unproven": "wrong"}, rival="loop",
            ),
            case_of("policy", 20, 2, timed(OURS, "float32", "called", 0.5)),
            case_of("sinusoid-k5", 25, 2, timed(OURS, "float32", "called", 0.001) | {"unproven": "wrong"}),
        ])),
    }  # fmt: skip
    text = table.markdown(found)
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    ours, reduced, first, policy, unproven = rows
    assert ours[:5] == ["sinusoid-k1", "25", "1", "2", "float32"]
    assert ours[5:8] == ["0.01 (0.009 to 0.0125) captured", "0.05 (0.045 to 0.0625)", "200"]  # TFLOP/s
    assert ours[8:10] == ["0.08 (0.072 to 0.1) torch.compile, called", "4.0x"]  # against ours of the same rounds
    assert ours[-1] == "0.012 ms met; 5x **missed**"
    assert reduced[8:10] == ["", ""]
    assert first[-1] == ""
    assert unproven[5] == "0.001 (0.0009 to 0.00125) called **unproven**"
    assert unproven[-1] == "not judged: unproven"
    assert policy[-1] == "0.25 ms **missed**; 5x not judged: no rival timed"
    assert any("sinusoid-k1 T=25 float32: time 5.00, FLOP 2.00, 2.50x" in x and "**missed**" in x for x in lines)
    assert "- Target not judged: omniglot T=32, 0.75 ms in tf32: not timed." in lines
    assert "- Step sanitizer skipped: compute-sanitizer is not installed" in lines
    assert lines[0].endswith("on: NVIDIA Abacus, 8 multiprocessors, 2.0 GiB, torch 2.9.")


def test_the_cases_have_the_targets_among_them_and_names_of_their_own():
    found = cases.cases(quick=False, emulated=False)
    assert set(table.TARGETS) <= {(case.workload_name, case.tasks) for case in found if case.order == 2}
    assert len(found) == len({case.name for case in found}) == 18
    assert all(case.workload().tasks == case.tasks for case in found)
    assert [case.order for case in found] == [2] * 9 + [1] * 9
    assert cases.Case("omniglot", 32, 2, small=True).workload().tasks == 2
    asked = cases.cases(quick=False, emulated=False, names=["policy-t20", "omniglot-t4"])
    assert [case.name for case in asked] == ["omniglot-t4", "policy-t20"]
    assert set(cases.PROFILED) <= {case.name for case in found}


def test_the_command_starts_where_maml_cuda_is_not_built():
    program = "import sys; sys.modules['maml_cuda'] = None; from benchmarks.gpu import __main__ as cli; cli.parse([])"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=machine.ROOT)


def test_slug():
    assert files.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "15"], "--seconds must be above 15, got 15"),
        (["--parts", "smoke,hours"], "--parts must be of smoke, ours, profile, rivals, precision; got hours"),
        (["--cases", "omniglot"], "--cases must be of omniglot-t4, omniglot-t32, mini-imagenet-t4, "),
        (["--emulated", "--cases", "omniglot-t4"], "got omniglot-t4"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err

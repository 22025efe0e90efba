"""The benchmarks on tiny shapes: a wrong answer is refused, FLOP are right, the report is true."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

# Appended, not prepended: the checkout's maml_cuda must not hide an installed one.
ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)
case, cli, flops, proof, report, rivals, timing, workloads = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("case", "__main__", "flops", "proof", "report", "rivals", "timing", "workloads")
)

OURS = case.OURS
WORKLOADS = workloads.WORKLOADS
SINUSOID = WORKLOADS["sinusoid-k1"].shrunk()
SIDES = {OURS: rivals.fused("fused"), **rivals.RIVALS}


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small gain nothing from more, and lose much where another process has the other core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spoiled(spoil):
    """The loop, its gradients changed by `spoil(parameter)` after each step."""

    def build(workload, model, tasks, first_order):
        step = rivals.autograd_loop(workload, model, tasks, first_order)

        def spoiled_step():
            step()
            spoil(next(model.parameters()))

        return spoiled_step

    return build


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_side_is_proven_on_every_workload(name, order):
    workload = WORKLOADS[name].shrunk()
    model, tasks = workload.build()
    expected = proof.truth(workload, model, tasks, order == 1)
    for build in SIDES.values():
        float64, float32 = proof.prove(build, workload, model, tasks, order == 1, expected)
        assert float64 <= proof.FLOAT64_LIMIT
        assert 0 < float32 <= workload.float32_limit


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_trace_and_repeat(name):
    model, tasks = WORKLOADS[name].build()
    again, tasks_again = WORKLOADS[name].build()
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(map(torch.equal, tasks, tasks_again))
    assert not torch.equal(tasks.x_spt[0], tasks.x_qry[0, : tasks.x_spt.shape[1]])
    x = tasks.x_spt[0]
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


def test_shapes_are_the_published_ones():
    shapes = {name: [tuple(x.shape) for x in workload.build()[1]] for name, workload in WORKLOADS.items()}
    assert shapes["sinusoid-k5"] == [(25, 10, 1)] * 4
    assert shapes["policy"] == [(20, 2000, 2)] * 4
    assert shapes["omniglot"] == [(4, 5, 1, 28, 28), (4, 5), (4, 75, 1, 28, 28), (4, 75)]
    assert shapes["mini-imagenet"] == [(4, 5, 3, 84, 84), (4, 5), (4, 75, 3, 84, 84), (4, 75)]
    assert shapes["resnet12"] == [(4, 5, 3, 32, 32), (4, 5), (4, 25, 3, 32, 32), (4, 25)]


@pytest.mark.parametrize(
    ("name", "forward", "first"),
    [
        ("sinusoid-k1", 3360, 80),
        ("policy", 20_800, 400),
        ("omniglot", 2 * 64 * (9 * 14**2 + 576 * (7**2 + 4**2 + 2**2) + 5), 2 * 64 * 9 * 14**2),
        (
            "mini-imagenet",
            2 * 32 * (27 * 84**2 + 288 * (42**2 + 21**2 + 10**2) + 5 * 25),
            2 * 32 * 27 * 84**2,
        ),
        ("resnet12", 46_597_376, 2 * 16 * (27 + 3) * 32**2),  # the shortcut reads the image too
    ],
)
def test_forward_flops(name, forward, first):
    model, tasks = WORKLOADS[name].build()
    assert flops.forward_flops(model, tasks.x_spt[0]) == (forward, first)


def test_meta_step_flops():
    workload = WORKLOADS["sinusoid-k5"]
    model, tasks = workload.build()
    first_order = 25 * (5 * 10 + 10) * (3 * 3360 - 80)
    assert flops.meta_step_flops(workload, model, tasks, first_order=True) == first_order
    second_order = first_order + 25 * 5 * 10 * (6 * 3360 - 4 * 80)
    assert flops.meta_step_flops(workload, model, tasks, first_order=False) == second_order


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.grad.mul_(1 + 1e-6),
        lambda p: p.grad.fill_(float("nan")),
        lambda p: setattr(p, "grad", None),
        lambda p: p.grad.mul_(2) if p.dtype == torch.float32 else None,
    ],
    ids=["slightly wrong", "nan", "missing", "wrong in float32 only"],
)
def test_a_wrong_answer_is_refused(spoil):
    record = case.measure(SINUSOID, 2, {OURS: rivals.autograd_loop, "spoiled": spoiled(spoil)}, 1e-3)
    side = record["sides"]["spoiled"]
    assert side["status"] == "wrong"
    assert "of the reference" in side["reason"]
    assert "wall_ms" not in side
    assert record["sides"][OURS]["status"] == "timed"
    assert record["speed_up"] is None


def test_first_order_is_refused_as_second_order():
    def first_order(workload, model, tasks, _):
        return rivals.autograd_loop(workload, model, tasks, True)

    record = case.measure(SINUSOID, 2, {"posing": first_order}, 1e-3)
    assert record["sides"]["posing"]["status"] == "wrong"


def test_a_failing_side_is_reported_and_the_rest_is_timed():
    def failing(*_):
        raise RuntimeError("out of luck")

    record = case.measure(SINUSOID, 1, {OURS: failing, **rivals.RIVALS}, 1e-3)
    assert record["sides"][OURS] == {"status": "failed", "reason": "RuntimeError: out of luck"}
    assert record["sides"]["autograd loop"]["status"] == "timed"
    assert record["fastest_rival"] in rivals.RIVALS


def test_steps_leave_the_same_gradient_when_repeated():
    model, tasks = SINUSOID.build()
    for build in SIDES.values():
        step = build(SINUSOID, model, tasks, False)
        step()
        once = [p.grad.clone() for p in model.parameters()]
        step()
        assert all(map(torch.equal, once, (p.grad for p in model.parameters())))


def test_rounds_interleave():
    calls = []
    timings = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0)
    assert "".join(calls) == "ab" + "ab" * timing.MIN_ROUNDS  # warm-up, then the rounds
    assert len(timings["a"].wall) == len(timings["a"].cpu) == timing.MIN_ROUNDS


def test_quartiles():
    assert timing.Timing(wall=[5.0, 1.0, 2.0, 4.0, 3.0]).quartiles() == (2.0, 3.0, 4.0)


def timed(median, error=1e-15):
    wall = {"q1": median * 0.9, "median": median, "q3": median * 1.25}
    return {
        "status": "timed",
        "error_float64": error,
        "wall_ms": wall,
        "cpu_ms": 2 * median,
        "floor_fraction": 0.5,
    }


def record_of(*cases):
    where = {
        "cpu": "Abacus",
        "cores": 4,
        "threads": 2,
        "torch": "2.6",
        "maml_cuda": {"version": "0.1.0", "cpu_isa": "avx2"},
        "commit": None,
    }
    return {"machine": where, "settings": {"quick": False}, "cases": [case_of(*c) for c in cases]}


def case_of(name, order, sides):
    shape = {"inner_steps": 5, "tasks": 4, "flops": 100 * order}
    return {"workload": name, "order": order, **shape, "sides": sides, **case.verdict(sides)}


def test_report():
    refused = {"status": "wrong", "reason": "too far off"}
    text = report.markdown(
        record_of(
            ("net", 1, {OURS: timed(2.0), "loop": timed(8.0), "vmap": timed(10.0)}),
            ("net", 2, {OURS: timed(250.0), "loop": timed(200.0), "vmap": refused}),
            ("overhead", 1, {OURS: timed(0.04), "loop": timed(0.4), "vmap": timed(0.5)}),
        )
    )
    lines = text.splitlines()
    assert lines[0] == "One meta-step on Abacus, 2 of 4 cores; torch 2.6, maml_cuda 0.1.0 (avx2), commit unknown."
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][4:8] == [OURS, "loop", "vmap", "speed-up"]
    assert rows[2][:7] == ["net", "1", "5", "4", "2 (1.8 to 2.5)", "8 (7.2 to 10)", "10 (9 to 12.5)"]
    assert rows[2][7:] == ["4.00x", "4", "50%", "1e-15"]
    assert rows[3][4:8] == ["250 (225 to 312)", "200 (180 to 250)", "**wrong**", "0.80x"]
    assert "- We lose: net, order 2, 1.25x slower than loop." in lines
    assert "- Not timed: net, order 2, vmap wrong: too far off" in lines
    assert "- Second over first order, net: FLOP 2.00, maml_cuda 125.00, loop 25.00." in lines
    assert "- A call and its backward with almost nothing to compute, order 1: 40 us." in lines


def test_report_says_when_we_lose_nothing():
    assert "- We lose none of the 1 cases compared." in report.markdown(
        record_of(("net", 1, {OURS: timed(1.0), "loop": timed(2.0)}))
    )


def test_command(tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = [
        "--workload",
        "sinusoid-k1",
        "overhead",
        "--quick",
        "--seconds",
        "0.001",
        "--json",
        str(file),
    ]
    assert cli.main(arguments) == 0
    record = json.loads(file.read_text())
    assert [(c["workload"], c["order"]) for c in record["cases"]] == [
        ("sinusoid-k1", 1),
        ("sinusoid-k1", 2),
        ("overhead", 1),
        ("overhead", 2),
    ]
    for measured in record["cases"]:
        assert set(measured["sides"]) == set(SIDES)
        for side in measured["sides"].values():
            assert side["status"] == "timed"
            wall = side["wall_ms"]
            assert 0 < wall["q1"] <= wall["median"] <= wall["q3"]
            assert side["floor_fraction"] * wall["median"] == pytest.approx(measured["floor_ms"])
        assert measured["floor_ms"] == pytest.approx(measured["flops"] / measured["sgemm_gflops"] / 1e6)
    assert record["settings"] == {"seconds": 0.001, "quick": True, "backend": "fused"}
    assert list(tmp_path.iterdir()) == [file]
    assert capsys.readouterr().out == report.markdown(record) + "\n"


def test_command_fails_when_our_answer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cli, "fused", lambda backend: spoiled(lambda p: p.grad.zero_()))
    assert cli.main(["--workload", "overhead", "--order", "1", "--quick", "--seconds", "0.001"]) == 1
    assert "overhead, order 1, maml_cuda wrong: torch.float64 meta-gradient must be" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "nan"], "--seconds must be above 0, got nan"),
        (["--json", "no/such/folder/x.json"], "--json must name a file in a folder that exists, got no/such"),
        (["--workload", "nothing"], "invalid choice: 'nothing'"),
        (["--order", "3"], "invalid choice: 3"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err

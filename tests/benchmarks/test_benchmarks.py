"""The benchmarks on small shapes: verification, FLOP counts, reports and the command."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import (
    case,
    flops,
    implementations,
    meta_steps,
    readme,
    report,
    targets,
    verification,
    workloads,
)
from maml_cuda.benchmark import timing
from maml_cuda.benchmark.baselines import autograd_loop
from maml_cuda.benchmark.verification import FLOAT64_TOLERANCE
from tests.benchmarks import broken_implementations as broken

pytestmark = pytest.mark.usefixtures("one_thread")

MAML_CUDA = implementations.MAML_CUDA
WORKLOADS = workloads.WORKLOADS
SINUSOID = WORKLOADS["sinusoid-k1"].shrunk()
# Baselines that need no other library and no compiler.
AVAILABLE = {name: implementations.BASELINES[name] for name in ("autograd loop", "learn2learn", "torch.func vmap")}
INCLUDED = {MAML_CUDA: meta_steps.fused("fused"), **AVAILABLE}
# What a baseline says of a workload that it cannot run.
REFUSED = {
    ("lstm", "torch.func vmap"): r"output with shape .* doesn't match the broadcast shape",  # in torch.lstm
    ("pinn", "torch.func vmap"): r"requires_grad_\(\).* functorch",
}
# One workload per model.
SMALL = [name for name in WORKLOADS if not any(part in name for part in ("-t", "shot", "gradncp", "transformer-k1"))]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_every_implementation_is_verified_on_every_workload(name, order):
    workload = WORKLOADS[name].shrunk()
    model, tasks = workload.build()
    expected = verification.reference_gradient(workload, model, tasks, order == 1)
    for baseline, build in INCLUDED.items():
        if (name, baseline) in REFUSED:
            with pytest.raises(RuntimeError, match=REFUSED[name, baseline]):
                verification.verify(build, workload, model, tasks, order == 1, expected)
            continue
        float64, float32, _ = verification.verify(build, workload, model, tasks, order == 1, expected)
        assert float64 <= FLOAT64_TOLERANCE
        assert 0 < float32 <= workload.float32_tolerance


@pytest.mark.parametrize("name", SMALL)
def test_workloads_repeat(name):
    model, tasks = WORKLOADS[name].build()
    again, tasks_again = WORKLOADS[name].build()
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(map(torch.equal, tasks, tasks_again))
    assert not torch.equal(tasks.x_spt[0], tasks.x_qry[0, : tasks.x_spt.shape[1]])


@pytest.mark.parametrize("name", SMALL)
def test_jax_has_the_same_model(name):
    jax = pytest.importorskip("jax")
    from benchmarks.jax_nets import net

    jax.config.update("jax_enable_x64", True)
    model, tasks = WORKLOADS[name].shrunk().build()
    model, x = model.double(), tasks.double().x_spt[0]
    theta = {name: jax.numpy.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    found = net(model)(theta, jax.numpy.asarray(x.numpy()))
    torch.testing.assert_close(torch.tensor(found.tolist(), dtype=x.dtype), model(x).detach(), rtol=1e-10, atol=1e-12)


def test_shapes_are_the_published_ones():
    shapes = {name: [tuple(x.shape) for x in workload.build()[1]] for name, workload in WORKLOADS.items()}
    assert shapes["sinusoid-k5"] == [(25, 10, 1)] * 4
    assert shapes["sinusoid-k5-t1000"] == [(1000, 10, 1)] * 4
    assert shapes["omniglot-20way"] == [(16, 20, 1, 28, 28), (16, 20), (16, 300, 1, 28, 28), (16, 300)]
    assert shapes["mini-imagenet-5shot"] == [(2, 25, 3, 84, 84), (2, 25), (2, 75, 3, 84, 84), (2, 75)]
    assert shapes["policy"] == [(20, 2000, 2)] * 4
    assert shapes["omniglot"] == [(4, 5, 1, 28, 28), (4, 5), (4, 75, 1, 28, 28), (4, 75)]
    assert shapes["mini-imagenet"] == [(4, 5, 3, 84, 84), (4, 5), (4, 75, 3, 84, 84), (4, 75)]
    assert shapes["lstm"] == [(4, 10, 30, 24), (4, 10, 1)] * 2
    assert shapes["transformer"] == [(4, 5, 32, 16), (4, 5), (4, 15, 32, 16), (4, 15)]
    assert shapes["siren"] == [(4, 1024, 2), (4, 1024, 3)] * 2
    assert shapes["siren-gradncp"] == [(8, 1024, 2), (8, 1024, 3)] * 2
    assert shapes["resnet12"] == [(4, 5, 3, 32, 32), (4, 5), (4, 25, 3, 32, 32), (4, 25)]


def mbconv_flops(inputs, outputs, side, stride):
    """Expansion, depthwise convolution, the two layers of the excitation, projection."""
    middle, after = 4 * inputs, (side // stride) ** 2
    expansion = inputs * middle * side**2
    return 2 * (expansion + middle * (9 * after + 2 * (inputs // 4) + outputs * after))


MBCONV = (
    2 * 16 * 27 * 16**2
    + mbconv_flops(16, 16, 16, 1)
    + mbconv_flops(16, 24, 16, 2)
    + mbconv_flops(24, 24, 8, 1)
    + mbconv_flops(24, 40, 8, 2)
    + 2 * 40 * 5
)
# Two convolutions at each of five places, two transposed convolutions, the head.
UNET = 2 * (
    9 * (32**2 * (3 * 16 + 16 * 16) + 16**2 * (16 * 32 + 32 * 32) + 8**2 * (32 * 64 + 64 * 64))
    + 9 * (16**2 * (64 * 32 + 32 * 32) + 32**2 * (32 * 16 + 16 * 16))
    + 4 * (8**2 * 64 * 32 + 16**2 * 32 * 16)
    + 32**2 * 16
)
# Of u: the first layer, three layers, the last one; the same for its derivatives by the point; of u_x by x: the first
# layer in both directions, three layers in both.
PINN = 2 * ((2 * 64 + 3 * 64**2 + 64) + (64 + 3 * 64**2 + 2 * 64) + (2 * 2 * 64 + 2 * 3 * 64**2))


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
        ("lstm", 2 * 30 * 256 * (24 + 64) + 2 * 64, 2 * 256 * (30 * 24 + 64)),  # the first state is constant
        # Parameters of a block: 4 d d of attention, 2 d h of the feed-forward net; its products of values: 2 L L d.
        ("transformer", 2 * 32 * 16 * 64 + 4 * (32 * (4 * 64 + 2 * 256) * 64 + 2 * 32**2 * 64) + 640, 2 * 32 * 16 * 64),
        ("siren", 2 * (2 * 128 + 3 * 128**2 + 128 * 3), 2 * 2 * 128),
        ("siren-gradncp", 2 * (2 * 256 + 4 * 256**2 + 256 * 3), 2 * 2 * 256),
        ("mbconv", MBCONV, 2 * 16 * 27 * 16**2),
        ("unet", UNET, 2 * 16 * 27 * 32**2),
        ("vit", 2 * 64 * 48 * 64 + 4 * (65 * (4 * 64 + 2 * 128) * 64 + 2 * 65**2 * 64) + 640, 2 * 64 * 48 * 64),
        ("pinn", PINN, 2 * (1 + 2) * 64),  # both derivatives start with a constant
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


WRONG = (
    broken.slightly_wrong,
    broken.not_a_number,
    broken.without_gradient,
    broken.wrong_in_float32,
    broken.first_order_only,
)


def test_broken_implementations_are_reported_and_the_others_are_timed():
    """Wrong gradients, errors and crashes are reported with the reason and affect no other implementation."""
    wrong = {f"wrong {i}": build for i, build in enumerate(WRONG)}
    failing = {name: getattr(broken, name) for name in ("failing", "missing", "crashing", "failing_later")}
    builders = {MAML_CUDA: meta_steps.fused("fused"), "autograd loop": autograd_loop, **wrong, **failing}
    record = case.measure(SINUSOID, 2, builders, 0.01, 120)
    found = record["sides"]
    for name in wrong:
        assert found[name]["status"] == "wrong"
        assert "of the reference" in found[name]["reason"]
    assert found["failing"] == {"status": "failed", "reason": "RuntimeError: a planted error"}
    assert found["missing"] == {"status": "missing", "reason": "No module named 'absent'"}
    assert found["crashing"]["status"] == "failed"
    assert "exit code 7" in found["crashing"]["reason"]
    assert found["failing_later"]["status"] == "failed"
    assert "during timing: RuntimeError: a planted later error" in found["failing_later"]["reason"]
    assert all("wall_ms" not in found[name] for name in (*wrong, *failing))
    assert found[MAML_CUDA]["status"] == found["autograd loop"]["status"] == "timed"
    assert record["fastest_rival"] == "autograd loop"
    assert record["speed_up"] > 0


def test_an_implementation_that_hangs_is_stopped():
    record = case.measure(SINUSOID, 1, {MAML_CUDA: meta_steps.fused("fused"), "hanging": broken.hanging}, 0.01, 12)
    assert record["sides"]["hanging"] == {"status": "no result", "reason": "no result in 12 s"}
    assert record["sides"][MAML_CUDA]["status"] == "timed"
    assert record["speed_up"] is None


def test_a_skipped_implementation_is_not_tried():
    builders = {"autograd loop": autograd_loop, "late": broken.failing}
    record = case.measure(SINUSOID, 1, builders, 0.01, 60, {"late": "too slow before"})
    assert record["sides"]["late"] == {"status": "no result", "reason": "too slow before"}


def test_steps_leave_the_same_gradient_when_repeated():
    model, tasks = SINUSOID.build()
    for build in INCLUDED.values():
        step = build(SINUSOID, model, tasks, False)
        step()
        once = [p.grad.clone() for p in model.parameters()]
        step()
        assert all(map(torch.equal, once, (p.grad for p in model.parameters())))


def test_rounds_interleave():
    calls = []

    def block(name):
        def run(seconds):
            calls.append(name)
            return timing.Timing(wall=[1.0], cpu=[1.0])

        return run

    once = {"a": 1e-3, "b": 0.5}  # of b, three steps and more are more than a second
    timings = timing.interleave({name: block(name) for name in once}, once, seconds=1)
    assert len(timings["a"].wall) == timing.MAX_ROUNDS
    assert len(timings["b"].wall) >= timing.MIN_ROUNDS
    assert "".join(calls).startswith("aba")


def test_quartiles():
    assert timing.Timing(wall=[5.0, 1.0, 2.0, 4.0, 3.0]).quartiles() == (2.0, 3.0, 4.0)


def timed(median, error=1e-15, **more):
    wall = {"q1": median * 0.9, "median": median, "q3": median * 1.25}
    result = {"status": "timed", "error_float64": error, "wall_ms": wall, "cpu_ms": 2 * median, "floor_fraction": 0.5}
    return {**result, "peak_bytes": 3 * 2**20, **more}


def record_of(*cases):
    where = {
        "cpu": "Abacus", "cores": 4, "threads": 2, "torch": "2.6", "commit": None, "rivals": {"higher": "0.2"},
        "maml_cuda": {"version": "0.1.0", "cpu_isa": "avx2"},
    }  # fmt: skip
    return {"machine": where, "settings": {"quick": False}, "cases": [case_of(*c) for c in cases], "growth": []}


def case_of(name, order, implementations):
    shape = {"inner_steps": 5, "tasks": 4, "flops": 100 * order, "floor_ms": 1.0}
    return {"workload": name, "order": order, **shape, "sides": implementations, **case.verdict(implementations, 1.0)}


def test_report():
    refused = {"status": "wrong", "reason": "too far off"}
    text = report.markdown(
        record_of(
            ("net", 1, {MAML_CUDA: timed(2.0), "loop": timed(8.0), "vmap": timed(10.0, note="a note")}),
            ("net", 2, {MAML_CUDA: timed(250.0), "loop": timed(200.0), "vmap": refused}),
            ("overhead", 1, {MAML_CUDA: timed(0.04), "loop": timed(0.4), "vmap": timed(0.5)}),
        )
    )
    lines = text.splitlines()
    machine = "One meta-step on Abacus, 2 of 4 cores; torch 2.6, maml_cuda 0.1.0 (avx2), commit unknown; higher 0.2."
    assert lines[0] == machine
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][4:8] == ["maml_cuda, ms", "fastest baseline", "its time, ms", "speed-up"]
    assert rows[2][:8] == ["net", "1", "4", "5", "2 (1.8 to 2.5)", "loop", "8 (7.2 to 10)", "4.00x"]
    assert rows[2][8:] == ["8.0x", "50%", "4 / 16", "3 / 3", "1e-15"]
    assert rows[3][4:8] == ["250 (225 to 312)", "loop", "200 (180 to 250)", "0.80x"]
    assert ["net", "2", "200 (0.8x)", "wrong"] in rows
    assert "- Slower than loop: net (order 2), 1.25x its time." in lines
    assert "- Not timed: vmap, net (order 2); wrong: too far off" in lines
    assert "- vmap: a note." in lines
    ratios = "FLOP 2.00; time: maml_cuda 125.00, loop 25.00; time over FLOP, maml_cuda: 62.50"
    assert f"- Second order over first order, net: {ratios}." in lines
    assert "- A meta-step with almost no arithmetic, order 1: 40 us." in lines


def test_summary():
    record = record_of(
        ("policy", 1, {MAML_CUDA: timed(2.0), "loop": timed(8.0)}),
        ("policy", 2, {MAML_CUDA: timed(9.0), "loop": timed(3.0)}),
    )
    lines = report.summary(record).splitlines()
    rows = [line for line in lines if line.startswith("| policy")]
    assert rows == ["| policy | 4 | 5 | 9 (8.1 to 11.2) | loop | 3 (2.7 to 3.75) | 0.33x | 2x | 3.0x | 50% |"]
    assert lines[-1] == "- Slower than loop: policy (order 2), 3.00x its time."


def test_report_says_if_no_baseline_is_faster():
    assert "- Slower in none of the 1 comparisons." in report.markdown(
        record_of(("net", 1, {MAML_CUDA: timed(1.0), "loop": timed(2.0)}))
    )


def test_the_time_is_fitted():
    points = [
        ("T", 1, 5.0),
        ("T", 2, 8.0),
        ("T", 4, 14.0),
        ("K", 1, 1.0),
        ("K", 2, 3.0),
        ("K", 3, 3.0),
        ("width", 1, 1.0),
    ]
    record = record_of(*(("net", 2, {MAML_CUDA: timed(ms)}) for _, _, ms in points))
    growth = [
        {**measured, "axis": axis, "value": value}
        for measured, (axis, value, _) in zip(record["cases"], points, strict=True)
    ]
    text = report.markdown({**record, "growth": growth})
    assert "- Time against T: 2 ms + 3 ms per task (least squares; largest relative error 0%)." in text
    assert "- Time against K: 0.333 ms + 1 ms per inner step (least squares; largest relative error 33%)." in text
    assert "Time against" not in report.markdown({**record, "growth": growth[:2]})


def test_targets_are_evaluated():
    def line(own, baseline, quick=False, name="omniglot"):
        cases = [case_of(name, 2, {MAML_CUDA: timed(own), "autograd loop": timed(baseline)})]
        (found,) = (line for line in targets.lines(cases, quick) if line.startswith("- Target omniglot,"))
        return found

    assert "met: 5.00x over autograd loop; at the sgemm rate it would be 10.0x" in line(2.0, 10.0)
    assert "**missed**: 2.00x" in line(5.0, 10.0)
    assert "not timed: learn2learn, higher" in line(2.0, 10.0)
    assert "not evaluated in a quick run" in line(2.0, 10.0, quick=True)
    assert "not evaluated, the workload was not run" in line(2.0, 10.0, name="policy")


def test_targets_over_baselines_by_name():
    sides = {MAML_CUDA: timed(2.0), "autograd loop": timed(20.0), "JAX": timed(9.0)}
    sides["JAX forward-over-reverse"] = timed(5.0)
    lines = list(targets.lines([case_of("transformer", 2, sides)], quick=False))
    over_loop = "met: 10.00x over autograd loop; at the sgemm rate it would be 20.0x"
    assert f"- Target transformer, 4x autograd loop: {over_loop}." in lines
    over_jax = "**missed**: 2.50x over JAX forward-over-reverse; at the sgemm rate it would be 5.0x"
    assert f"- Target transformer, 3x JAX or JAX forward-over-reverse: {over_jax}." in lines
    sides["JAX"] = sides["JAX forward-over-reverse"] = {"status": "missing", "reason": "absent"}
    lines = list(targets.lines([case_of("transformer", 2, sides)], quick=False))
    assert "- Target transformer, 3x JAX or JAX forward-over-reverse: not evaluated, no baseline was timed." in lines
    assert [targets.cell(name) for name in ("siren", "transformer", "overhead")] == [
        "2x",
        "4x autograd loop, 3x JAX",
        "",
    ]


def test_a_page_holds_the_report_between_its_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.write("new", [tmp_path / "plot.png"], tmp_path / "report.md", file)
    start, _, link_and_plot = file.read_text().partition("new\n\n")
    assert start == f"before\n{readme.BEGIN}\n"
    assert link_and_plot.startswith("[The whole report](report.md)")
    assert link_and_plot.endswith(f"\n\n![plot](plot.png)\n{readme.END}\nafter\n")
    file.write_text("no markers")
    with pytest.raises(ValueError, match="must hold the markers"):
        readme.write("new", [], tmp_path / "report.md", file)
    assert file.read_text() == "no markers"


@pytest.mark.parametrize(
    ("page", "summary"), [(readme.README, report.short_summary), (readme.PAGE, report.summary)], ids=["README", "docs"]
)
def test_the_pages_show_the_record_that_they_link_to(page, summary):
    text = page.read_text()
    block = text[text.index(readme.BEGIN) : text.index(readme.END)]
    (linked,) = re.findall(r"\[The whole report\]\((.*)\)", block)
    record = json.loads((page.parent / linked).with_suffix(".json").read_text())
    assert summary(record) in block


def test_command(tmp_path, capsys):
    arguments = ["--workload", "sinusoid-k1", "growth", "--quick", "--seconds", "0.01", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--baseline", "autograd-loop", "learn2learn"]) == 0
    (file,) = tmp_path.glob("*-quick.json")
    record = json.loads(file.read_text())
    assert file.stem.endswith(f"-{record['machine']['maml_cuda']['cpu_isa']}-quick")
    assert [(c["workload"], c["order"]) for c in record["cases"]] == [("sinusoid-k1", 1), ("sinusoid-k1", 2)]
    assert {(c["axis"], c["value"]) for c in record["growth"]} >= {("T", 1), ("K", 2), ("width", 16)}
    for measured in record["cases"]:
        assert set(measured["sides"]) == {MAML_CUDA, "autograd loop", "learn2learn"}
        for result in measured["sides"].values():
            assert result["status"] == "timed"
            wall = result["wall_ms"]
            assert 0 < wall["q1"] <= wall["median"] <= wall["q3"]
            assert result["floor_fraction"] * wall["median"] == pytest.approx(measured["floor_ms"])
        assert measured["floor_ms"] == pytest.approx(measured["flops"] / measured["sgemm_gflops"] / 1e6)
    assert file.with_suffix(".md").read_text() == report.markdown(record) + "\n"
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".md", ".png"}
    assert capsys.readouterr().out == report.markdown(record) + "\n"


def test_baselines_may_run_at_one_order_only(tmp_path):
    arguments = ["--workload", "overhead", "--quick", "--seconds", "0.01", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--baseline", "autograd-loop", "--baseline-order", "2"]) == 0
    (file,) = tmp_path.glob("*-quick.json")
    first, second = json.loads(file.read_text())["cases"]
    assert (first["order"], set(first["sides"])) == (1, {MAML_CUDA})
    assert (second["order"], set(second["sides"])) == (2, {MAML_CUDA, "autograd loop"})


def test_command_fails_if_maml_cuda_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "fused", lambda backend: broken.without_gradient)
    arguments = [
        "--workload",
        "overhead",
        "--order",
        "1",
        "--quick",
        "--seconds",
        "0.01",
        "--baseline",
        "autograd-loop",
    ]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "maml_cuda, overhead (order 1); wrong: torch.float64 meta-gradient" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "100000"], f"--threads must be at most {os.cpu_count()}, the cores of this machine, got 100000"),
        (["--seconds", "nan"], "--seconds must be above 0, got nan"),
        (["--limit", "0"], "--limit must be above 0, got 0"),
        (["--readme", "--quick"], "--readme must go with a full run"),
        (["--workload", "nothing"], "invalid choice: 'nothing'"),
        (["--baseline", "nothing"], "invalid choice: 'nothing'"),
        (["--order", "3"], "invalid choice: 3"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err

"""The command `python -m benchmarks.gpu` on the emulated kernels: its parts, its time limit, its records."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from benchmarks import files, worker
from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import (
    check,
    facts,
    fused,
    implementations,
    machine,
    parts,
    record,
    table,
    verification,
)
from tests.benchmarks.gpu_runs import MAML_CUDA, options_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_command(tmp_path, few_rounds, monkeypatch, capsys):
    monkeypatch.setattr(record.Run, "TIMED_SECONDS", (1e-4, 1e-4))
    monkeypatch.setattr(parts, "STEPS", tuple(replace(step, limit=math.inf) for step in parts.STEPS))
    names = ["sinusoid-k1-t2", "omniglot-t2-first-order"]
    arguments = ["--emulated", "--quick", "--seconds", "3000"]  # ample: other tests run beside this one
    arguments += ["--out", str(tmp_path), "--parts", ",".join(parts.PARTS)]
    assert cli.main([*arguments, "--cases", ",".join(names)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emulated-gpu.json", "emulated-gpu.md"]
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    skipped = {"build", "memcheck", "nsight"}
    assert statuses == {step.name: "skipped" if step.name in skipped else "done" for step in parts.STEPS}
    assert found["smallest"]["meta_steps"] == 2 * len(implementations.PRECISIONS)
    assert found["tests"]["counts"]["passed"] > 0
    assert all(fact["value"] > 0 for fact in found["facts"].values())

    theirs = [f"{name}: {method} float32" for method in ("torch.func vmap", "autograd loop") for name in names]
    assert list(found["cases"]) == [*(f"{name}: fused" for name in names), *theirs]
    for name in names:
        case = found["cases"][f"{name}: fused"]
        assert case["executor"] == ("megakernel" if "sinusoid" in name else "batched")
        assert case["float64"]["error"] <= 1e-10
        assert set(case["smooth"]) == {"reference", *implementations.PRECISIONS}
        assert case["smooth"]["float32"] <= 2 * case["smooth"]["reference"] + verification.SLACK
        assert {(s["method"], s["precision"], s["form"]) for s in case["implementations"].values()} == {
            (MAML_CUDA, precision, form) for precision in implementations.PRECISIONS for form in ("called", "graphs")
        }
    for name in theirs:
        case = found["cases"][name]
        assert set(case["smooth"]) == {"reference", case["baseline"]}
        forms = [f"{MAML_CUDA} float32 called", f"{MAML_CUDA} float32 graphs", f"{case['baseline']} float32 called"]
        assert sorted(case["implementations"]) == sorted(forms)
    for case in found["cases"].values():
        for result in case["implementations"].values():
            assert result["status"] == "timed"
            assert "unverified" not in result
            assert 0 < result["ms"]["q1"] <= result["ms"]["median"] <= result["ms"]["q3"]
    batched = found["cases"]["omniglot-t2-first-order: fused"]["smooth"]
    assert batched["float32"] < batched["bf16x3"] < batched["tf32"] < batched["bfloat16"]
    assert list(found["kernels"]) == names
    by_precision = found["kernels"]["sinusoid-k1-t2"]
    assert by_precision["float32"].keys() == by_precision["tf32"].keys()  # the megakernel computes in float32 only
    for precisions in found["kernels"].values():
        for kernels in precisions.values():
            times = [kernel["us"] for kernel in kernels.values()]
            assert times == sorted(times, reverse=True)
            assert all(kernel["launches"] >= 1 for kernel in kernels.values())

    text = (tmp_path / "emulated-gpu.md").read_text()
    assert text == table.markdown(found) + "\n"
    assert text in capsys.readouterr().out
    assert "**Emulated on a CPU, to test the command; the times are not meaningful.**" in text
    by_precision = found["precision"]["omniglot"]["errors"]
    assert list(by_precision) == list(implementations.PRECISIONS)
    assert by_precision["float32"]["smooth"] < by_precision["bf16x3"]["smooth"] < by_precision["tf32"]["smooth"]
    assert by_precision["bfloat16"]["decisions"] > by_precision["bfloat16"]["flips"] >= 0
    lines = text.splitlines()
    assert sum(line.startswith("| omniglot, T = 2 | `") for line in lines) == len(implementations.PRECISIONS)
    assert "| `small_mlp<float>` | 1 |" in text
    rows = [line for line in lines if line.startswith(("| sinusoid-k1 |", "| omniglot |"))]
    assert len(rows) == 2 * len(implementations.PRECISIONS)
    assert sum("autograd loop, called" in row or "vmap, called" in row for row in rows) == 2
    assert "met" not in "".join(rows)  # targets are not evaluated for emulated times


def test_a_failing_part_is_recorded_and_the_rest_goes_on(tmp_path, few_rounds, monkeypatch, capsys):
    def failing(*_, **__):
        raise RuntimeError("a planted error")

    monkeypatch.setattr(record.Run, "TIMED_SECONDS", (1e-4, 1e-4))
    monkeypatch.setattr(check, "tests", failing)
    monkeypatch.setattr(facts, "launch", failing)
    arguments = ["--emulated", "--quick", "--out", str(tmp_path), "--cases", "sinusoid-k1-t2"]
    assert cli.main([*arguments, "--parts", "smoke,fused"]) == 1
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert found["parts"]["tests"]["status"] == "failed"
    assert found["parts"]["tests"]["reason"] == "RuntimeError: a planted error"
    assert found["facts"]["launch"] == {"failed": "RuntimeError: a planted error"}
    assert found["facts"]["copy"]["value"] > 0
    assert found["parts"]["fused"]["status"] == "done"
    assert (
        found["cases"]["sinusoid-k1-t2: fused"]["implementations"][f"{MAML_CUDA} float32 called"]["status"] == "timed"
    )
    text = capsys.readouterr().out
    assert "- Step tests failed: RuntimeError: a planted error" in text
    assert "- launch: not measured: RuntimeError: a planted error" in text

    # A wrong result of an earlier run is not a failure of a later run.
    result = found["cases"]["sinusoid-k1-t2: fused"]["implementations"][f"{MAML_CUDA} float32 called"]
    result["unverified"] = "wrong"
    (tmp_path / "emulated-gpu.json").write_text(json.dumps(found))

    # A later run keeps the results of an earlier one, and earlier failures do not count.
    assert cli.main([*arguments, "--parts", "profile"]) == 0
    both = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert both["cases"] == found["cases"]
    assert both["parts"]["tests"] == found["parts"]["tests"]
    assert both["parts"]["kernels"]["status"] == "done"


def test_steps_without_time_left_are_reported(tmp_path, capsys, few_rounds, monkeypatch):
    run = record.Run(options_of(tmp_path))
    with pytest.raises(worker.TimedOut, match="no time left for sinusoid-k1-t2: fused; omniglot-t2: fused"):
        parts.fused(run, 0.5)
    monkeypatch.setattr(record, "RESERVE", 600.0)
    begin = time.monotonic()
    assert cli.main(["--emulated", "--quick", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 5
    assert "Step describe skipped: no time left" in capsys.readouterr().out


def test_facts_are_written_as_they_come(tmp_path, monkeypatch):
    def one(*_):
        yield {"launch": {"value": 1.0, "unit": "us", "of": "a kernel"}}
        raise worker.TimedOut("stopped after its 7 seconds")

    monkeypatch.setattr(facts, "facts", one)
    run = record.Run(options_of(tmp_path))
    run.record["machine"] = {"gpu": {"name": "Abacus"}}
    with pytest.raises(worker.TimedOut):
        parts.facts(run, 10)
    assert json.loads((tmp_path / "abacus.json").read_text())["facts"]["launch"]["value"] == 1.0
    assert "- launch: 1 us (a kernel)." in (tmp_path / "abacus.md").read_text()


def test_a_time_out_is_no_failure(tmp_path, few_rounds, monkeypatch):
    def late(*_):
        raise worker.TimedOut("stopped after its 7 seconds")
        yield

    monkeypatch.setattr(record.Run, "TIMED_SECONDS", (1e-4, 1e-4))
    monkeypatch.setattr(fused, "measure", late)
    arguments = ["--emulated", "--quick", "--out", str(tmp_path), "--cases", "sinusoid-k1-t2", "--parts", "fused"]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "emulated-gpu.json").read_text())
    assert found["cases"] == {"sinusoid-k1-t2: fused": {"stopped": "stopped after its 7 seconds"}}
    assert found["parts"]["fused"]["status"] == "stopped"
    assert "- Not finished: sinusoid-k1-t2: fused: stopped after" in (tmp_path / "emulated-gpu.md").read_text()


def test_the_command_starts_where_maml_cuda_is_not_built():
    program = "import sys; sys.modules['maml_cuda'] = None; from benchmarks.gpu import __main__ as cli; cli.parse([])"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=machine.ROOT)


def test_slug():
    assert files.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "15"], "--seconds must be above 15, got 15"),
        (["--parts", "smoke,hours"], "--parts must be of smoke, fused, profile, baselines, precision; got hours"),
        (["--cases", "omniglot"], "--cases must be of omniglot-t4, omniglot-t32, mini-imagenet-t4, "),
        (["--emulated", "--cases", "omniglot-t4"], "got omniglot-t4"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err

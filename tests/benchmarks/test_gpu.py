"""The command `python -m benchmarks.gpu` on the emulated kernels: its parts, its time limit, its records."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from benchmarks import files, worker
from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import (
    check,
    facts,
    machine,
    ours,
    parts,
    proof,
    record,
    sides,
    table,
)
from tests.benchmarks.gpu_runs import OURS, options_of

pytestmark = pytest.mark.usefixtures("one_thread")


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

"""The machinery under the command for a GPU: shares of the time, processes that die, the programs it runs."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import worker
from benchmarks.gpu import check, jax_rival, parts, record


def dawdle(run, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_every_part_keeps_to_its_share(tmp_path, monkeypatch):
    given = {}

    def part(name, most, least):
        return parts.Part(name, lambda run, seconds: (given.update({name: seconds}), dawdle(run, seconds)), most, least)

    monkeypatch.setattr(parts, "PARTS", (part("long", 9, 0.1), part("short", 0.1, 0.1), part("last", 9, 0.3)))
    run = record.Run({"quick": True, "emulated": True, "seconds": 1e-3}, tmp_path, 1.0)
    parts.perform(run)
    assert given["long"] == pytest.approx(0.6, abs=0.05)
    assert given["short"] <= 0.1
    assert 0.2 < given["last"] <= 0.35
    assert run.elapsed() < 1.3
    assert list(tmp_path.iterdir()) == []  # nothing is written of a device without a name


JOBS = """
import os, time

def well():
    yield {"a": {"b": 1}}
    yield {"a": {"c": 2}}

def dies():
    yield {"before": True}
    os._exit(7)

def hangs():
    yield {"before": True}
    time.sleep(60)

def raises():
    yield {"before": True}
    raise ValueError("no")
"""


def test_a_job_apart_costs_only_itself(tmp_path, monkeypatch):
    (tmp_path / "some_gpu_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = record.Run({"quick": True, "emulated": False, "seconds": 1e-3}, tmp_path / "out", 60.0)
    try:
        for job, seconds, reason in (
            ("dies", 20, "its process died (exit code 7)"),
            ("hangs", 1.5, "stopped after its 1.5 seconds"),
            ("raises", 20, "ValueError: no"),
            ("well", 20, None),
        ):
            found = {}
            assert run.job(found, f"some_gpu_jobs:{job}", seconds=seconds) == reason
            assert found == ({"a": {"b": 1, "c": 2}} if reason is None else {"before": True, "failed": reason})
    finally:
        run.close()


def test_a_build_goes_on_without_pip(monkeypatch):
    commands, built = [], []

    def execute(command, seconds, **variables):
        commands.append(command[1:])
        assert variables == {"MAML_CUDA_BUILD": "cuda", "MAML_CUDA_ARCHITECTURES": "90"}
        if "pip" in command:
            return 1, "configuration error: `project.license` must be valid exactly by one definition"
        built.append(True)
        return 0, ""

    monkeypatch.setattr(check, "execute", execute)
    monkeypatch.setattr(check, "installed", lambda: {"cuda": "13.0"} if built else None)
    found = check.build("9.0", 60)
    assert commands == [list(check.PIP), list(check.IN_PLACE)]
    assert found["build_info"] == {"cuda": "13.0"}
    built.clear()
    monkeypatch.setattr(check, "installed", lambda: None)
    with pytest.raises(worker.Failed, match="the build failed"):
        check.build("9.0", 60)


def test_limit():
    begin = time.monotonic()
    with pytest.raises(worker.OutOfTime), worker.limit(0.05):
        time.sleep(20)
    assert time.monotonic() - begin < 10


def test_the_suite_is_counted_also_when_it_is_cut_short(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import os, time, pytest\n"
        "def test_good(): assert os.environ['MAML_CUDA_MACHINES'] == 'abacus'\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
        "def test_slow(): time.sleep(float(os.environ.get('SLEEP', 0)))\n"
    )
    begin = time.monotonic()
    found = check.tests("abacus", (str(suite),), 60)
    took = time.monotonic() - begin
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert [name.partition("::")[2] for name in found["not_passed"]] == ["test_bad"]
    assert any("assert 1 == 2" in line for line in found["last_lines"])
    suite.write_text("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(600)\n")
    found = check.tests("abacus", (str(suite),), 1 + 3 * took)  # enough to begin, on a busy machine too
    assert found["counts"] == {"passed": 1}
    assert found["exit_code"] is None
    assert found["notes"][-1].startswith("stopped after ")


def test_missing_tools_are_skipped_in_words(monkeypatch):
    monkeypatch.setattr(check, "tool", lambda name: None)
    with pytest.raises(check.Skipped, match="compute-sanitizer is not installed"):
        check.sanitizer("memcheck", 1)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(check.Skipped, match="pytest is not installed"):
        check.tests("cuda", check.TESTS, 1)
    with pytest.raises(ModuleNotFoundError, match="JAX is not installed"):
        jax_rival.JaxStep("float32", None, None, None, False)


@pytest.mark.parametrize(
    ("printed", "code", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "clean"),
        ("========= ERROR SUMMARY: 2 errors", 86, "found something"),
        ("Segmentation fault", 139, "did not come to its end"),
    ],
)
def test_sanitizer(printed, code, verdict, tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '{printed}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(check, "tool", lambda name: str(program))
    found = check.sanitizer("memcheck", 10)
    assert found["verdict"] == verdict
    assert found["summary"] == (printed[10:] if "SUMMARY" in printed else None)


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(worker.Failed, match="there is no NVIDIA GPU here"):
        list(check.describe(False))

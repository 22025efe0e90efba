"""The parts of the GPU benchmark: time limits, processes that crash, external programs."""

from __future__ import annotations

import json
import re
import sysconfig
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import worker
from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import check, jax_meta_step, parts, record


def wait(run, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def run_in(folder, seconds, *more):
    """A run with this many seconds, plus its reserve."""
    return record.Run(cli.parse(["--out", str(folder), "--seconds", str(seconds + record.RESERVE), *more]))


def test_every_step_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    given = {}

    def step(name, most, least, part=""):
        def do(run, seconds):
            given[name] = seconds
            wait(run, seconds)

        return parts.Step(name, part, do, most, least)

    steps = (step("long", 9, 0.1), step("short", 0.1, 0.1), step("last", 9, 0.3), step("unasked", 9, 9, "precision"))
    monkeypatch.setattr(parts, "STEPS", steps)
    run = run_in(tmp_path, 1.0, "--emulated")
    parts.perform(run)
    assert list(given) == ["long", "short", "last"]
    assert given["long"] == pytest.approx(0.6, abs=0.05)
    assert given["short"] <= 0.1
    assert 0.2 < given["last"] <= 0.35
    assert run.elapsed() < 1.3
    assert list(tmp_path.iterdir()) == []  # nothing is written before the device has a name


JOBS = """
import os, time

def well():
    yield {"a": {"b": 1}}
    yield {"a": {"c": os.getpid()}}

def crashes():
    yield {"before": True}
    os._exit(7)

def hangs():
    yield {"before": True}
    time.sleep(60)

def raises():
    yield {"before": True}
    raise ValueError("no")
"""


def test_a_failing_job_does_not_affect_the_next_one(tmp_path, monkeypatch):
    (tmp_path / "some_gpu_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = run_in(tmp_path / "out", 100.0)
    try:
        for job, seconds, end, reason in (
            ("crashes", 30, "failed", "the process ended with exit code 7"),
            ("hangs", 3, "stopped", "stopped at its time limit of 3 s"),
            ("raises", 30, "failed", "ValueError: no"),
        ):
            found = {}
            assert str(run.job(found, f"some_gpu_jobs:{job}", seconds=seconds)) == reason
            assert found == {"before": True, end: reason}
        processes = []
        for fresh in (False, False, True):
            found = {}
            assert run.job(found, "some_gpu_jobs:well", seconds=30, fresh=fresh) is None
            assert found["a"]["b"] == 1
            processes.append(found["a"]["c"])
        assert processes[0] == processes[1] != processes[2]
    finally:
        run.close()


def test_every_piece_is_written_at_once(tmp_path, monkeypatch):
    run = run_in(tmp_path, 60.0, "--emulated")
    written = []

    def pieces(target, *arguments, seconds):
        for piece in ({"gpu": {"name": "Abacus"}}, {"driver": "1"}):
            yield piece
            written.append(json.loads((tmp_path / "abacus.json").read_text())["machine"])

    monkeypatch.setattr(run._worker, "run", pieces)
    run.job(run.record["machine"], "any:thing", seconds=1)
    assert written == [{"gpu": {"name": "Abacus"}}, {"gpu": {"name": "Abacus"}, "driver": "1"}]


def test_prebuilt_module(tmp_path, monkeypatch):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / "maml_cuda").mkdir()
    monkeypatch.setattr(check, "ROOT", tmp_path)
    right, other = tmp_path / f"_core{suffix}", tmp_path / "_core.cpython-27-sparc.so"
    for module in (right, other):
        module.write_bytes(b"code")
    monkeypatch.setattr(check, "installed", lambda: {"cuda": "13.0"})
    assert check.prebuilt(right) == {"build_info": {"cuda": "13.0"}, "build": "prebuilt"}
    assert (tmp_path / "maml_cuda" / right.name).read_bytes() == b"code"
    with pytest.raises(worker.Failed, match=r"for this Python, named _core\.\S+, got _core\.cpython-27-sparc\.so"):
        check.prebuilt(other)
    with pytest.raises(worker.Failed, match=r"--prebuilt must be a file, got .*absent"):
        check.prebuilt(tmp_path / "absent")
    for info in (None, {"cuda": None}):
        monkeypatch.setattr(check, "installed", lambda info=info: info)
        with pytest.raises(worker.Failed, match="--prebuilt must have CUDA kernels and import here, got"):
            check.prebuilt(right)


@pytest.mark.parametrize(
    ("script", "error", "expected"),
    [
        ("echo 'Section: GPU Speed Of Light Throughput'", None, "1 launches in report.txt"),
        ("echo no permission; exit 1", worker.Failed, "ncu ended with exit code 1\nno permission"),
        ("echo begun; sleep 60", worker.TimedOut, "stopped after 2 seconds; the output until then is in report.txt"),
    ],
)
def test_nsight(script, error, expected, tmp_path, monkeypatch):
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(check, "tool", lambda name: str(program))
    file = tmp_path / "report.txt"
    if error is None:
        assert check.nsight(["-m", "this"], file, 30) == expected
    else:
        with pytest.raises(error, match=re.escape(expected)):
            check.nsight(["-m", "this"], file, 2)
    assert file.read_text()


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
    with pytest.raises(worker.TimeLimitExceeded), worker.time_limit(0.05):
        time.sleep(20)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("workers", [0, 1])
def test_tests_are_counted_also_after_a_timeout(tmp_path, workers):
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import os, time, pytest\n"
        "def test_good(): assert os.environ['MAML_CUDA_MACHINES'] == 'abacus'\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
        "def test_slow(): time.sleep(float(os.environ.get('SLEEP', 0)))\n"
    )
    begin = time.monotonic()
    found = check.tests("abacus", (str(suite),), 60, workers)
    took = time.monotonic() - begin
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert [name.partition("::")[2] for name in found["not_passed"]] == ["test_bad"]
    assert any("assert 1 == 2" in line for line in found["last_lines"])
    suite.write_text("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(600)\n")
    found = check.tests("abacus", (str(suite),), 1 + 3 * took, workers)  # enough to start, also on a busy machine
    assert found["counts"] == {"passed": 1}
    assert found["exit_code"] is None
    assert found["notes"][-1].startswith("stopped after ")


def test_missing_tools_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "tool", lambda name: None)
    with pytest.raises(check.Skipped, match="compute-sanitizer is not installed"):
        check.sanitizer("memcheck", 1)
    with pytest.raises(check.Skipped, match=r"ncu \(Nsight Compute\) is not installed"):
        check.nsight([], tmp_path / "report.txt", 1)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(check.Skipped, match="pytest is not installed"):
        check.tests("cuda", check.TESTS, 1, 1)
    with pytest.raises(ModuleNotFoundError, match="JAX is not installed"):
        jax_meta_step.JaxStep("float32", None, None, None, False)


@pytest.mark.parametrize(
    ("printed", "code", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "clean"),
        ("========= ERROR SUMMARY: 2 errors", 86, "found errors"),
        ("Segmentation fault", 139, "did not finish"),
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


def test_a_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(worker.Failed, match="there is no NVIDIA GPU"):
        list(check.describe(False))

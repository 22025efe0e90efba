"""Steps that run other programs: build, tests, compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import replace
from ..worker import Failed, TimedOut
from .machine import ROOT, machine

TESTS = (
    "tests/cuda/test_backend.py", "tests/cuda/test_streams_and_devices.py", "tests/engine/test_fast_path.py",
    "tests/engine/test_meta_gradient.py", "tests/engine/test_constructor_errors.py",
    "tests/engine/test_call_errors.py", "tests/engine/test_block_errors.py", "tests/layers",
)  # fmt: skip
SMALL_TESTS = ("tests/engine/test_block_errors.py::test_no_rate_to_repeat",)  # for the emulation, where tests are slow
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
WORKERS = 8  # pytest processes; one alone does not keep the GPU busy
PIP = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
# Without pip, or with a setuptools too old for pyproject.toml: builds only the library, into the checkout.
IN_PLACE = (
    "-c",
    "import pathlib, runpy; here = pathlib.Path.cwd(); build = runpy.run_path('setup.py'); "
    "build['compile_with_cmake'](here / 'build' / 'in_place', here / 'maml_cuda', '0', build['find_nvcc']())",
)
NSIGHT_KERNELS = "forward_kernel|gradients_kernel|normalise_backward|megakernel|small_mlp|stem"
CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


class Skipped(Exception):
    """The step cannot run; the message says what is missing."""


def execute(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Runs a command in its own process group. Returns its exit code (None after a timeout) and its output."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PATH": search_path(), **variables}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # also its children, such as compilers and tests
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def search_path() -> str:
    """PATH, preceded by the programs of this Python's environment, which may not be activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def tail(text: str, lines: int = 25) -> list[str]:
    return [line[:300] for line in text.rstrip().splitlines()[-lines:]]


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, or None."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    folders = [None, *(f"{home}/bin" for home in homes), *CUDA_FOLDERS]
    return next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


def first_match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1).strip() if found else None


def describe(emulated: bool) -> Iterator[dict[str, Any]]:
    """A job that describes the GPU and its software. It does not need maml_cuda."""
    import torch

    if not emulated and not torch.cuda.is_available():
        raise Failed("torch.cuda.is_available() is False: there is no NVIDIA GPU, or torch was built without CUDA")
    gpu = machine(emulated).describe()
    yield {"gpu": gpu, "torch": torch.__version__, "say": f"{gpu['name']}, torch {torch.__version__}"}
    if emulated:
        return
    versions = {}
    if smi := shutil.which("nvidia-smi"):
        _, text = execute([smi, "--query-gpu=driver_version", "--format=csv,noheader"], 20)
        versions["driver"] = first_match(r"^\s*([\d.]+)", text)
    if nvcc := tool("nvcc"):
        versions["nvcc"] = first_match(r"release [\d.]+, V([\d.]+)", execute([nvcc, "--version"], 20)[1])
    yield versions


def installed() -> dict[str, Any] | None:
    """build_info() of the maml_cuda that a new process imports; None if the import fails."""
    program = "import json, maml_cuda; print('build_info', json.dumps(maml_cuda.build_info()))"
    found = first_match(r"build_info (\{.*\})", execute([sys.executable, "-c", program], 60)[1])
    return json.loads(found) if found else None


def build(capability: str | None, seconds: float) -> dict[str, Any]:
    """Builds maml_cuda with kernels for this GPU, unless the installed one has CUDA kernels."""
    info = installed()
    if info and info["cuda"]:
        return {"build_info": info, "build": "already installed"}
    variables = {"MAML_CUDA_BUILD": "cuda"}
    if capability:
        variables["MAML_CUDA_ARCHITECTURES"] = capability.replace(".", "")
    begin = time.monotonic()
    for command in (PIP, IN_PLACE):
        code, text = execute([sys.executable, *command], seconds - (time.monotonic() - begin), **variables)
        took = time.monotonic() - begin
        if code is None:
            raise Failed(f"the build exceeded its time limit of {took:.0f} s")
        info = installed()
        if code == 0 and info and info["cuda"]:
            return {"build_info": info, "build": f"{' '.join(command)} took {took:.0f} seconds", "build_seconds": took}
    raise Failed("\n".join([f"the build failed (exit code {code}) after {took:.0f} seconds", *tail(text)]))


def prebuilt(module: Path) -> dict[str, Any]:
    """Copies a compiled module into the checkout, where this Python imports it.

    Raises:
        Failed: the file does not exist, is for another version of Python, or has no CUDA kernels.
    """
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    if not module.is_file():
        raise Failed(f"--prebuilt must be a file, got {module}")
    if module.name != f"_core{suffix}":
        raise Failed(f"--prebuilt must be a module for this Python, named _core{suffix}, got {module.name}")
    own = ROOT / "maml_cuda" / module.name
    if not own.exists() or not own.samefile(module):
        shutil.copy2(module, own)
    info = installed()
    if not info or not info["cuda"]:
        raise Failed(f"--prebuilt must have CUDA kernels and import here, got {info or 'an import that fails'}")
    return {"build_info": info, "build": "prebuilt"}


def nsight(program: list[str], file: Path, seconds: float) -> str:
    """Runs Nsight Compute on a program and writes its report to a file. Returns a line about it."""
    ncu = tool("ncu")
    if ncu is None:
        raise Skipped("ncu (Nsight Compute) is not installed")
    options = ["--clock-control", "none", "--kernel-name", f"regex:{NSIGHT_KERNELS}", "--launch-count", "40"]
    sections = ["--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats"]
    code, text = execute([ncu, *options, *sections, sys.executable, *program], seconds)
    replace(file, text)
    if code is None:
        raise TimedOut(f"stopped after {seconds:.0f} seconds; the output until then is in {file.name}")
    if code:
        raise Failed("\n".join([f"ncu ended with exit code {code}", *tail(text, 6)]))
    return f"{text.count('Section: GPU Speed Of Light')} launches in {file.name}"


def tests(backend: str, paths: tuple[str, ...], seconds: float, workers: int) -> dict[str, Any]:
    """Runs tests on one backend. Returns the counts by outcome, and the last lines of output after a failure."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    paths = tuple(path for path in paths if (ROOT / path.partition("::")[0]).exists())
    if not paths:
        raise Skipped("the tests are missing, because this is not a checkout")
    notes = []
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    if not parallel:
        notes.append("pytest-xdist is not installed, so one process was used")
    command = [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=10", "-p", "no:cacheprovider", *parallel,
        # No test needs these plugins, and every process would import them.
        "-p", "no:hypothesispytest", "-p", "no:benchmark",
        # Warnings of other libraries must not fail the tests here.
        "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", *paths,
    ]  # fmt: skip
    code, text = execute(command, seconds, MAML_CUDA_MACHINES=backend)
    alone = re.findall(rf"^(\S+::.*?) ({OUTCOMES})\b", text, re.MULTILINE)
    by_workers = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (\S+::.*?) *$", text, re.MULTILINE)
    outcomes = [*alone, *((name, outcome) for outcome, name in by_workers)]
    counts = Counter(outcome.lower() for _, outcome in outcomes)
    found = {
        "backend": backend,
        "paths": list(paths),
        "exit_code": code,
        "counts": dict(counts),
        "not_passed": [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")][:20],
        "notes": notes,
    }
    if code is None:
        notes.append(f"stopped after {seconds:.0f} seconds; the remaining tests did not run")
    elif not counts["passed"]:
        notes.append("no test ran on this backend")
    if code:
        found["last_lines"] = tail(text)
    return found


def sanitizer(name: str, seconds: float) -> dict[str, Any]:
    """Runs a tool of compute-sanitizer on the smallest meta-steps of both executors."""
    program = tool("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    # Ignores failed driver calls, because torch probes the driver for optional functions.
    options = ["--tool", name, "--error-exitcode", "86", "--report-api-errors", "no"]
    command = [program, *options, sys.executable, "-m", "benchmarks.gpu.smallest"]
    # Without torch's caching allocator, so that an access beyond a tensor does not hit another tensor.
    code, text = execute(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = first_match(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
    verdict = "clean" if code == 0 else "timed out" if code is None else "found errors"
    if code and summary is None:
        verdict = "did not finish"
    found: dict[str, Any] = {"verdict": verdict, "summary": summary, "exit_code": code}
    return found if code == 0 else {**found, "last_lines": tail(text)}

"""The emulation of CUDA on the CPU: correct kernels give correct results, and every mistake is found.

tests/cuda/emulation/planted.cu holds small kernels, and copies of them with one mistake each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "emulation"
SANITIZERS = {
    "": [],
    "thread": ["-fsanitize=thread", "-Og", "-g"],
    "address": ["-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all", "-Og", "-g"],
}
SCHEDULES = ["forward", "backward", "shuffled:1", "shuffled:2"]
RIGHT = [
    "transpose", "row sum", "warp reversal", "warp functions", "shared memory", "pipeline", "graph", "broken capture",
    "branch", "last block", "early", "limits", "after a failure", "host threads",
]  # fmt: skip

Run = Callable[..., str]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def compile_cpp(*arguments: str | Path) -> None:
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-O1", "-I", FOLDER, *arguments]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a case of planted.cu, built with a sanitizer or with none, and returns its output."""
    folder = tmp_path_factory.mktemp("emulation")
    compile_cpp("-c", FOLDER / "emulation.cpp", "-o", folder / "emulation.o")

    def run_case(case: str, schedule: str = "forward", sanitizer: str = "") -> str:
        program = folder / f"planted_{sanitizer}"
        if not program.exists():
            flags = SANITIZERS[sanitizer]
            sources = ["-x", "c++", FOLDER / "planted.cu", "-x", "none", folder / "emulation.o"]
            compile_cpp(*flags, *sources, "-o", program)
        environment = os.environ | {"MAML_CUDA_EMULATION_SCHEDULE": schedule}
        command = [program, case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "unexpected memory mapping" in done.stderr:  # ThreadSanitizer and address randomisation
            done = subprocess.run(["setarch", "-R", *command], env=environment, capture_output=True, text=True)
        if not sanitizer:
            assert done.returncode == 0, done.stderr
        return (done.stdout + done.stderr).strip()

    return run_case


@pytest.mark.parametrize("case", RIGHT)
def test_correct_kernels_pass(run: Run, case: str) -> None:
    for schedule in SCHEDULES:
        assert run(case, schedule) == "right"
    assert run(case, "shuffled:3", "thread") == "right"
    assert run(case, "forward", "address") == "right"


@pytest.mark.parametrize(
    "case",
    [
        "transpose without its barrier",
        "row sum without its barrier",
        "warp reversal without its barrier",
        "pipeline without a barrier after the wait",
        "pipeline without a barrier before reuse",
    ],
)
def test_missing_barrier(run: Run, case: str) -> None:
    verdicts = [run(case, schedule) for schedule in SCHEDULES]
    assert any(v.startswith("wrong") for v in verdicts), verdicts
    for schedule in ["forward", "shuffled:1"]:  # the race detector does not depend on the schedule
        assert "ThreadSanitizer: data race" in run(case, schedule, "thread")


def test_a_shuffle_does_not_order_memory(run: Run) -> None:
    case = "warp reversal that takes a shuffle for a barrier"
    assert run(case) == "right"
    report = run(case, sanitizer="thread")
    assert "ThreadSanitizer: data race" in report
    assert "planted.cu" in report
    assert "Location is global" in report  # the report names the variable


def test_a_branch_of_a_graph_must_be_joined_and_left_alone(run: Run) -> None:
    assert run("branch without a join") == "capturing stream has unjoined work"
    assert run("branch that reads what the origin overwrites").startswith("wrong")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "nan"),
    [
        ("transpose that loses the tail", 95),  # 5 columns of 19
        ("shared memory uninitialised", 8),  # the second block; the first one has written the same place
        ("pipeline without a wait", 16),
        ("pipeline that waits for too few", 16),
    ],
)
def test_unwritten_memory_is_nan(run: Run, case: str, nan: int, schedule: str) -> None:
    verdict = run(case, schedule)
    assert verdict.startswith("wrong")
    assert verdict.endswith(f"nan: {nan}")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "row sum with an early return",
            [
                "divergent barrier: of 128 threads 64 wait at __syncthreads (",
                "13 wait for lanes of their warp at __shfl_xor_sync (",
                "51 have returned in block",
            ],
        ),
        (
            "two barriers",
            ["divergent barrier: one waits at __syncthreads (", "of 16 threads wait at another (", "planted.cu:"],
        ),
        ("row sum with a wrong mask", ["__shfl_xor_sync (", "the mask lacks the lane that calls: thread"]),
        ("row sum of mixed shuffles", ["divergent warp: __shfl_", "meets __shfl_"]),
        ("trap", ["__trap(): thread (5, 0, 0) in block (0, 0, 0)"]),
    ],
)
def test_divergent_barriers_are_named(run: Run, case: str, words: list[str], schedule: str) -> None:
    verdict = run(case, schedule)
    assert verdict.startswith("emulation: ")
    for expected in words:
        assert expected in verdict


@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("row sum of one element too many", "AddressSanitizer: heap-buffer-overflow"),
        ("shared memory past the dynamic end", "AddressSanitizer: heap-buffer-overflow"),
        ("shared memory past the static end", "runtime error: index 8 out of bounds for type 'float [8]'"),
    ],
)
def test_out_of_bounds(run: Run, case: str, report: str) -> None:
    verdict = run(case, sanitizer="address")
    assert report in verdict
    assert "planted.cu:" in verdict


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("pipeline with a misaligned address that is not read", "an asynchronous copy of misaligned bytes"),
        ("shared memory of a function", "which no launch limit counts: declare it in the kernel"),
        ("early without a wait", "programmatic dependent launch does not wait for those before it: thread (0, 0, 0)"),
    ],
)
def test_invalid_launches_are_refused(run: Run, case: str, words: str, schedule: str) -> None:
    verdict = run(case, schedule)
    assert verdict.startswith("emulation: ")
    assert words in verdict


def test_a_last_block_that_does_not_wait_for_the_others_is_found(run: Run) -> None:
    assert any(run("last block that is a fixed one", schedule).startswith("wrong") for schedule in SCHEDULES)
    assert run("last block whose counter stays") == "wrong: the counter is not zero"


def test_unknown_schedule(run: Run) -> None:
    for schedule in ["sideways", "shuffled:", "shuffled:x", "forward:1"]:
        assert run("row sum", schedule).endswith(f"is forward, backward or shuffled[:seed], not {schedule}")

"""Runs the C++ programs of tests/cuda/emulation: each kernel against plain loops, in three schedules.

With the tiles that ship, and with smaller ones, so that small shapes have many tiles; the sanitizers only run those.

MAML_CUDA_SANITIZERS=thread,address runs them under a race detector and an address sanitizer instead (minutes).
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests import emulated

PROGRAMS = [
    "bank_conflicts",
    "chunks",
    "conv2d",
    "layers",
    "loops",
    "losses",
    "policy",
    "product",
    "recurrence",
    "small_mlp",
    "stem",
    "summed_pair",
    "wgmma",
]
# The arguments that run one schedule. `product` has none to choose.
SHUFFLED = ("chunks", "layers", "loops", "losses", "policy", "recurrence", "small_mlp", "stem", "summed_pair")
ONE_SCHEDULE = {"conv2d": ["1"], **{name: ["shuffled"] for name in SHUFFLED}}
SANITIZERS = os.environ.get("MAML_CUDA_SANITIZERS", "").split(",")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("small_tiles", [False, True])
def test_kernels(program: str, sanitizer: str, small_tiles: bool) -> None:
    if sanitizer and not small_tiles:
        pytest.skip("the sanitizers run with small tiles: the same code, and more tiles")
    if sanitizer and program == "bank_conflicts":
        pytest.skip("this program runs no kernel")
    command = [str(emulated.build(f"test_{program}", sanitizer, small_tiles) / f"test_{program}")]
    if sanitizer == "thread":  # ThreadSanitizer fails where address randomisation uses too many bits
        command = ["setarch", "-R", *command]
    if sanitizer:  # which finds the same in every schedule
        command += ONE_SCHEDULE.get(program, [])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

"""The CPU backend on AArch64: cross-compiled, run by an emulator, compared with this machine's result.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.building import build
from tests.conftest import run

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
TASKS, SUPPORT, QUERY, CLASSES = 5, 6, 7, 3  # as in portable/meta_step.cpp

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(5, 19, 3, 2, 1), nn.BatchNorm2d(19), nn.SiLU(), nn.Flatten(), nn.Linear(19 * 4, CLASSES),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 21), nn.GELU(), nn.Linear(21, CLASSES))


SAMPLES = {conv: (2, 9, 8), mlp: (3,)}


@pytest.fixture(scope="module")
def program() -> Path:
    """tests/cpu/portable/meta_step.cpp for AArch64, built by CMakeLists.txt."""
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")
    return build("aarch64", "meta_step", "-DMAML_CUDA_PYTHON=OFF", *target) / "meta_step"


def numbers(tensor: Tensor) -> bytes:
    return tensor.detach().double().numpy().tobytes()


@pytest.mark.parametrize("make", SAMPLES)
def test_the_meta_gradient(program, make):
    model = make().double()
    data = []
    for n in (SUPPORT, QUERY):
        data += [torch.randn(TASKS, n, *SAMPLES[make]).double(), torch.randint(CLASSES, (TASKS, n))]
    given = b"".join(map(numbers, [*model.parameters(), *data]))
    command = [EMULATOR, "-L", LIBRARIES, str(program), make.__name__]
    done = subprocess.run(command, input=given, capture_output=True, check=True)
    losses, gradient = torch.from_numpy(numpy.frombuffer(done.stdout).copy()).split_with_sizes(
        [TASKS, sum(p.numel() for p in model.parameters())]
    )
    maml = FusedMAML(model, 0.1, 2, backend="fused")
    _, expected = run(maml, data)
    torch.testing.assert_close(losses, maml(*data).task_losses, rtol=1e-12, atol=0)
    expected = torch.cat([g.flatten() for g in expected.values()])
    assert (gradient - expected).norm() <= 1e-12 * expected.norm()

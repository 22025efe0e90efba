"""The build says what it cannot do before it does anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("cuda", "MAML_CUDA_BUILD=cuda needs nvcc, found none"),
        ("gpu", "MAML_CUDA_BUILD must be auto, cpu or cuda, got 'gpu'"),
    ],
)
def test_a_build_that_cannot_be_had(choice: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MAML_CUDA_BUILD": choice, "CUDACXX": "/nowhere/nvcc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode != 0
    assert words in build.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_an_instruction_set_that_is_not_there() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import maml_cuda; maml_cuda.build_info()"],
        env={**os.environ, "MAML_CUDA_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "MAML_CUDA_CPU_ISA must be one of" in run.stderr
    assert "got mmx" in run.stderr

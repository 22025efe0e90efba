"""setup.py and CMake: what they refuse before they compile, and the options that they pass on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import maml_cuda

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


def commands(folder: Path, *options: str) -> str:
    """The commands by which CMake would compile the CPU backend."""
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DMAML_CUDA_PYTHON=OFF", *options]
    subprocess.run([*configure, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"], check=True, capture_output=True)
    return (folder / "compile_commands.json").read_text()


def test_a_warning_stops_the_builds_of_developers_alone(tmp_path: Path) -> None:
    pytest.importorskip("cmake")
    users = commands(tmp_path / "user")
    assert "-Wall -Wextra" in users
    assert "-Werror" not in users
    assert "-Werror" in commands(tmp_path / "developer", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON")


def test_the_build_passes_arguments_on_to_cmake(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    stub = tmp_path / "bin" / "cmake"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit 1\n')
    stub.chmod(0o755)
    environment = {
        "MAML_CUDA_BUILD": "cpu",
        "CMAKE_ARGS": "-DA=1 '-DB=2 3'",
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
    }
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    assert build.returncode != 0
    assert (tmp_path / "arguments").read_text().endswith("-DA=1 -DB=2 3\n")


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


def test_build_info() -> None:
    info = maml_cuda.build_info()
    assert {"version", "cuda", "cuda_architectures", "cpu_isa", "compiler"} <= set(info)
    assert info["version"] == maml_cuda.__version__
    assert isinstance(info["cuda_architectures"], list)
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["compiler"]

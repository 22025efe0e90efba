"""Builds maml_cuda._core with CMake. Everything else about the package stands in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Drives CMakeLists.txt; MAML_CUDA_BUILD=auto|cpu|cuda chooses the backends."""

    def build_extension(self, ext: Extension) -> None:
        choice = os.environ.get("MAML_CUDA_BUILD", "auto")
        if choice not in ("auto", "cpu", "cuda"):
            raise SystemExit(f"MAML_CUDA_BUILD must be auto, cpu or cuda, got {choice!r}")
        if choice == "cuda":
            raise SystemExit(
                "MAML_CUDA_BUILD=cuda: this version of maml_cuda has no CUDA kernels yet; "
                "build with MAML_CUDA_BUILD=auto or cpu"
            )
        import pybind11

        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMAML_CUDA_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        print(f"maml_cuda: built the CPU backend (MAML_CUDA_BUILD={choice})", file=sys.stderr)


setup(ext_modules=[Extension("maml_cuda._core", [])], cmdclass={"build_ext": CMakeBuild})

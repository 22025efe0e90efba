"""Builds the extension module maml_cuda._core with CMake. The package metadata is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt. Environment variables:

    MAML_CUDA_BUILD: "auto" (default) builds the CUDA kernels if nvcc is found, a GPU is not needed; "cpu"; or "cuda",
        which fails without nvcc.
    MAML_CUDA_ARCHITECTURES: GPU architectures, such as "80;90". The last one is also built as PTX for newer GPUs.
    CMAKE_ARGS: further arguments for CMake.
    """

    def build_extension(self, ext: Extension) -> None:
        choice = os.environ.get("MAML_CUDA_BUILD", "auto")
        if choice not in ("auto", "cpu", "cuda"):
            raise SystemExit(f"MAML_CUDA_BUILD must be auto, cpu or cuda, got {choice!r}")
        nvcc = find_nvcc()
        if choice == "cuda" and nvcc is None:
            raise SystemExit(
                "MAML_CUDA_BUILD=cuda needs nvcc, found none in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or "
                "/usr/local/cuda; install a CUDA toolkit, or build with MAML_CUDA_BUILD=cpu"
            )
        with_cuda = choice != "cpu" and nvcc is not None
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        compile_with_cmake(
            Path(self.build_temp).resolve(),
            library.parent,
            self.distribution.get_version(),
            nvcc if with_cuda else None,
        )
        built = f"the CPU and the CUDA backend ({nvcc})" if with_cuda else "the CPU backend"
        print(f"maml_cuda: built {built} (MAML_CUDA_BUILD={choice})", file=sys.stderr)


def compile_with_cmake(build: Path, folder: Path, version: str, nvcc: str | None) -> None:
    """Builds in `build` and writes the library to `folder`, with the CUDA kernels if nvcc is given."""
    import pybind11

    build.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DMAML_CUDA_VERSION={version}",
        f"-DMAML_CUDA_BACKEND={'cuda' if nvcc else 'none'}",
    ]  # fmt: skip
    if nvcc:
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if architectures := os.environ.get("MAML_CUDA_ARCHITECTURES"):
            configure.append(f"-DMAML_CUDA_ARCHITECTURES={architectures}")
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(build)], check=True)


def find_nvcc() -> str | None:
    """The path of nvcc: CUDACXX if set, else the first in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda; or None."""
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [f"{home}/bin" for home in homes] + [None, "/usr/local/cuda/bin"]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


if __name__ == "__main__":
    setup(ext_modules=[Extension("maml_cuda._core", [])], cmdclass={"build_ext": CMakeBuild})

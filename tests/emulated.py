"""The CUDA kernels emulated on the CPU: the same sources, compiled with tests/cuda/emulation on first use."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import maml_cuda
from tests import building


def build(target: str, sanitizer: str = "", small_tiles: bool = False) -> Path:
    """Builds a target of CMakeLists.txt with the emulated backend and returns its folder.

    sanitizer: "thread", "address" or "" for none.
    small_tiles: smaller tiles and blocks than on a GPU, so that small shapes have many of them.
    """
    name = "-".join(filter(None, ["emulated", sanitizer, "small" if small_tiles else ""]))
    tiles = "ON" if small_tiles else "OFF"
    options = (f"-DMAML_CUDA_SANITIZER={sanitizer}", f"-DMAML_CUDA_SMALL_TILES={tiles}")
    return building.build(name, target, "-DMAML_CUDA_BACKEND=emulated", *options)


_small_tiles_in_place = False  # of the build that is in place of a GPU


def load(small_tiles: bool | None = None) -> ModuleType:
    """The extension module in which the backend "cuda" is the emulation; None: the one in place of a GPU."""
    return _load(_small_tiles_in_place if small_tiles is None else small_tiles)


@functools.cache
def _load(small_tiles: bool) -> ModuleType:
    (library,) = build("_emulated", small_tiles=small_tiles).glob("_emulated*.so")
    # pybind11 keeps modules by their name: each build needs one of its own.
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}._emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__file__ == str(library)
    return module


class Core:
    """In place of maml_cuda._core: problems of the backend "cuda" are the emulation's, those of "cpu" the library's."""

    def __init__(self, emulation: ModuleType) -> None:
        self._emulation = emulation
        self.Unsupported = emulation.Unsupported, maml_cuda._core.Unsupported

    def Problem(self, plan: Any, *arguments: Any) -> Any:
        return (self._emulation if plan.backend == "cuda" else maml_cuda._core).Problem(plan, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._emulation, name)


def controls(small_tiles: bool | None = None) -> ctypes.CDLL:
    """The C functions by which a test controls the emulated device: tests/cuda/emulation/controls.cpp."""
    library = ctypes.CDLL(str(load(small_tiles).__file__))
    library.emulation_launches.restype = ctypes.c_int64
    library.emulation_make_stream.restype = ctypes.c_void_p
    library.emulation_logged.restype = ctypes.c_char_p
    library.emulation_begin_capture.argtypes = [ctypes.c_void_p]
    library.emulation_end_capture.argtypes = [ctypes.c_void_p]
    library.emulation_end_capture.restype = ctypes.c_void_p
    library.emulation_replay.argtypes = [ctypes.c_void_p]
    return library


@contextmanager
def log(only: bool = False, small_tiles: bool | None = None) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Yields a function that returns the kernels launched so far, one dictionary per launch.

    only: log the launches without running the kernels.
    """
    library = controls(small_tiles)
    library.emulation_log(2 if only else 1)
    try:
        yield lambda: json.loads(library.emulation_logged())
    finally:
        library.emulation_log(0)


@contextmanager
def in_place_of_a_gpu(precisions: bool = False, small_tiles: bool = False) -> Iterator[None]:
    """Runs CPU tensors on the emulated kernels. precisions: accept every `precision`, as on a GPU."""
    from maml_cuda.data import episodes
    from maml_cuda.engine import cuda_runner, problem

    core = load(small_tiles)
    changes = [
        (problem, "_core", Core(core)),
        (episodes, "_core", core),
        (cuda_runner, "backend_of", lambda _: "cuda"),
        (cuda_runner, "stream_of", lambda _: 0),
    ]
    changes.append((cuda_runner, "is_capturing", lambda: False))
    if precisions:
        changes.append((cuda_runner, "has_precisions", lambda _: True))
    changes.append((sys.modules[__name__], "_small_tiles_in_place", small_tiles))
    problem.problem_of.cache_clear()
    with ExitStack() as stack:
        stack.callback(problem.problem_of.cache_clear)
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield

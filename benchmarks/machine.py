"""The machine and the software versions of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import maml_cuda
from maml_cuda.train.provenance import commit, cpu_name

LIBRARIES = ("learn2learn", "higher", "torchopt", "jax", "parallel-metalearn")


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maml_cuda": maml_cuda.build_info(),
        "rivals": {name: version for name in LIBRARIES if (version := version_of(name))},
        "commit": commit(),
    }


def version_of(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None

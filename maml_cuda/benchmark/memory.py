"""The peak memory of a step, measured as resident memory of its process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from maml_cuda.engine import cpu_workspace

PROCESS = Path("/proc/self")


def peak_bytes(step: Callable[[], object]) -> int | None:
    """Peak resident bytes during one step minus those before it. None where the system does not report them.

    The step must have run before. Memory that it keeps between calls does not count, except the workspace of maml_cuda.
    Free memory is returned to the system first, so that its reuse counts.
    """
    cpu_workspace.drop()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def resident(key: str) -> int:
    """VmRSS (current) or VmHWM (peak), in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])

"""How much memory a step takes: what it adds to the resident memory of its process while it runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from maml_cuda.engine import cpu_workspace

PROCESS = Path("/proc/self")


def peak_bytes(step: Callable[[], object]) -> int | None:
    """The most bytes resident during one step beyond those before it; None where the system does not tell.

    The step has run before: what it keeps from call to call is not counted, but for our own workspace. Free memory is
    given back first, so that a step cannot hide in it.
    """
    cpu_workspace.drop()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (its peak), in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])

"""What ptxas gave each kernel of the installed library: cuobjdump says it, no GPU is needed."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = "sm_90"
RESERVED = 1024  # bytes of shared memory that the system takes of each block, and cuobjdump counts where there are any


class Usage(NamedTuple):
    registers: int  # of a thread
    shared: int  # bytes that the kernel declares itself


def tool() -> str:
    """cuobjdump, from PATH or from the package nvidia-cuda-cuobjdump."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or next(map(str, packaged), "")


@functools.cache
def usage() -> dict[str, Usage]:
    """By the kernel's name as C++ writes it; of several with one name, in files of their own, the most that one takes.
    Empty where the library has no kernels for the architecture, or a tool is missing."""
    from maml_cuda import _core

    if _core.cuda is None or not tool() or not shutil.which("c++filt"):
        return {}
    command = [tool(), "-arch", ARCHITECTURE, "-res-usage", str(_core.__file__)]
    dumped = subprocess.run(command, capture_output=True, text=True).stdout
    readable = subprocess.run(["c++filt"], input=dumped, capture_output=True, text=True, check=True).stdout
    found: dict[str, Usage] = {}
    for name, registers, shared in re.findall(r"Function (.+):\n\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", readable):
        before = found.get(name, Usage(0, 0))
        own = max(0, int(shared) - RESERVED)
        found[name] = Usage(max(before.registers, int(registers)), max(before.shared, own))
    return found

"""Registers, shared memory and machine code of each kernel in a library, read by cuobjdump. It needs no GPU."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = "sm_90"
RESERVED = (
    1024  # bytes of shared memory per block that the system reserves; cuobjdump includes them if a kernel uses any
)


class Usage(NamedTuple):
    registers: int  # per thread
    shared: int  # bytes of static shared memory


def tool() -> str:
    """The path of cuobjdump, from PATH or the package nvidia-cuda-cuobjdump; "" if there is none."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or next(map(str, packaged), "")


def dump(file: Path, *options: str) -> str:
    """What cuobjdump prints of a library or an object file."""
    environment = {"PATH": f"{Path(tool()).parent}:/usr/bin:/bin"}
    command = [tool(), *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def machine_code(file: Path, architecture: str, kernels: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """The mangled name and the disassembly of each kernel for an architecture, such as "sm_90"; or of these kernels.

    All of the library takes a minute.
    """
    chosen = ("-fun", ",".join(kernels)) if kernels else ()
    code = dump(file, "-arch", architecture, "-sass", *chosen)
    parts = re.split(r"^\s*Function : (\S+)$", code, flags=re.MULTILINE)[1:]
    return zip(parts[::2], parts[1::2], strict=True)


@functools.cache
def usage() -> dict[str, Usage]:
    """Usage by C++ name of the kernel; the maximum over kernels with the same name in different files.

    Empty if the library has no kernels for the architecture, or if cuobjdump or c++filt is missing.
    """
    from maml_cuda import _core

    if _core.cuda is None or not tool() or not shutil.which("c++filt"):
        return {}
    command = [tool(), "-arch", ARCHITECTURE, "-res-usage", str(_core.__file__)]  # lists those of sm_90a too
    dumped = subprocess.run(command, capture_output=True, text=True).stdout
    readable = subprocess.run(["c++filt"], input=dumped, capture_output=True, text=True, check=True).stdout
    found: dict[str, Usage] = {}
    for name, registers, shared in re.findall(r"Function (.+):\n\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", readable):
        before = found.get(name, Usage(0, 0))
        own = max(0, int(shared) - RESERVED)
        found[name] = Usage(max(before.registers, int(registers)), max(before.shared, own))
    return found

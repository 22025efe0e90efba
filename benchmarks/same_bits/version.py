"""One installed version of maml_cuda, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..worker import Failed, SeparateProcess
from .cases import Case

PATIENCE = 3600.0  # seconds for a job


class Version:
    """The version in `folder` on an instruction set ("": the best); its process starts with the first job."""

    def __init__(self, folder: Path, isa: str = "") -> None:
        self._where = (str(folder), isa)
        self._process = SeparateProcess()

    def instruction_sets(self) -> list[str]:
        """Those of this build that this machine has, widest first."""
        return self._run("instruction_sets", *self._where)

    def bits(self, case: Case) -> dict[str, Any]:
        """`{"hashes": {name: hash}, "error": words or ""}`; a process that dies is an error too."""
        try:
            return self._run("bits", *self._where, case)
        except Failed as error:
            return {"hashes": {}, "error": str(error)}

    def prepare(self, case: Case, through_autograd: bool, seconds: float) -> None:
        """Makes a case's meta-step ready to be timed, and warms it up for so many seconds."""
        self._run("prepare", *self._where, case, through_autograd, seconds)

    def block(self, seconds: float) -> float:
        """The median time of a step, over so many seconds of them."""
        return self._run("block", seconds)

    def stop(self) -> None:
        self._process.stop()

    def _run(self, job: str, *arguments: Any) -> Any:
        (piece,) = self._process.run(f".same_bits.jobs:{job}", *arguments, seconds=PATIENCE)
        return piece


@contextmanager
def started(folders: Sequence[Path], isa: str) -> Iterator[list[Version]]:
    """The versions in these folders, whose processes end with the body."""
    versions = [Version(folder, isa) for folder in folders]
    try:
        yield versions
    finally:
        for version in versions:
            version.stop()

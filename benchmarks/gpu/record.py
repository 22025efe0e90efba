"""What was found, and how much time is left: written to disk whenever there is something new: nothing gets lost."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..files import replace, slug
from ..worker import Apart, Failed, Here, Stopped
from .table import OURS, markdown

Record = dict[str, Any]
RESERVE = 15.0  # seconds kept free for ending a process that does not answer, and for this one to start and to write


def merge(into: Record, piece: Record) -> None:
    """Adds a piece, dictionaries inside dictionaries included."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def fill(into: Record, earlier: Record) -> None:
    """Adds what is not there, dictionaries inside dictionaries included."""
    for key, value in earlier.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            fill(into[key], value)
        else:
            into.setdefault(key, value)


class Run:
    """One run of the command.

    record: settings, machine, parts (status, seconds, reason), tests, sanitizer, facts, cases by job, kernels,
    precision.
    What another run has left of the same machine in the same folder stays, as far as this one does not replace it.
    """

    SIDE_SECONDS = (0.3, 0.05)  # timed, of each side; with --quick

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {"quick": options.quick, "emulated": options.emulated}
        self.record: Record = {"settings": settings, "machine": {}, "parts": {}, "cases": {}}
        self.emulated: bool = options.emulated
        self.quick: bool = options.quick
        self.parts: list[str] = options.parts
        self.case_names: list[str] | None = options.cases
        self.prebuilt: Path | None = options.prebuilt
        self.folder: Path = options.out
        self.side_seconds = self.SIDE_SECONDS[options.quick]
        self._begin = time.monotonic()
        self._end = self._begin + options.seconds - RESERVE
        self._resumed = False
        self._noted: Record = {}  # by this run, not by an earlier one
        self._measured: list[str] = []
        self._worker = Here() if self.emulated else Apart()

    def left(self) -> float:
        return self._end - time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def job(self, into: Record, target: str, *arguments: Any, seconds: float, fresh: bool = False) -> Failed | None:
        """Runs a job and merges its pieces into `into`; why it did not come to its end, in words there, too.

        fresh: in a process that nothing else has used.
        """
        if fresh:
            self._worker.stop()
        try:
            for piece in self._worker.run(target, *arguments, seconds=max(0.0, min(seconds, self.left()))):
                self.say(piece.pop("say", None))
                merge(into, piece)
                self.write()
        except Failed as error:
            into["stopped" if isinstance(error, Stopped) else "failed"] = str(error)
            self.say(str(error))
            self.write()
            return error
        return None

    def _resume(self) -> None:
        """Takes over what another run of the same machine has left."""
        path = self.files()[0]
        if path.exists() and (earlier := json.loads(path.read_text()))["settings"] == self.record["settings"]:
            fill(self.record, earlier)
        self._resumed = True

    def say(self, text: str | None) -> None:
        if text:
            print(f"[{self.elapsed():3.0f} s] {text}", flush=True)

    def case(self, name: str) -> Record:
        """The record of a case that is measured anew."""
        self._measured.append(name)
        self.record["cases"][name] = {}
        return self.record["cases"][name]

    def note(self, step: str, found: Record) -> None:
        """How a step ended."""
        self._noted[step] = self.record["parts"][step] = found

    def failed(self) -> bool:
        """Whether a step of this run has failed, or an answer of ours is wrong or was not to be had."""
        if "gpu" not in self.record["machine"] or any(step["status"] == "failed" for step in self._noted.values()):
            return True
        sides = [side for name in self._measured for side in self.record["cases"][name].get("sides", {}).values()]
        return any(side["who"] == OURS and (side["status"] == "failed" or "unproven" in side) for side in sides)

    def close(self) -> None:
        self._worker.stop()

    def files(self) -> list[Path]:
        """The JSON and the Markdown; none before the device has a name."""
        if "gpu" not in self.record["machine"]:
            return []
        name = slug(self.record["machine"]["gpu"]["name"])
        return [self.folder / f"{name}.json", self.folder / f"{name}.md"]

    def write(self) -> None:
        if self.files() and not self._resumed:
            self._resume()
        texts = (json.dumps(self.record, indent=2), markdown(self.record))
        for path, text in zip(self.files(), texts, strict=False):
            replace(path, text)

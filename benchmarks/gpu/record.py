"""The record of a run and its time budget. The record is written whenever there is something new."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..files import replace, slug
from ..worker import CurrentProcess, Failed, SeparateProcess, TimedOut
from .table import MAML_CUDA, markdown

Record = dict[str, Any]
RESERVE = 15.0  # seconds to end a process that does not respond, to start, and to write the results


def merge(into: Record, piece: Record) -> None:
    """Adds a piece, and merges nested dictionaries."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def fill(into: Record, earlier: Record) -> None:
    """Adds the keys that are missing, also in nested dictionaries."""
    for key, value in earlier.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            fill(into[key], value)
        else:
            into.setdefault(key, value)


class Run:
    """One run of the command.

    The record has settings, machine, parts (status, seconds, reason), tests, sanitizer, facts, cases by job, kernels
    and precision. It keeps the results of an earlier run on the same machine in the same folder, unless this run
    replaces them.
    """

    TIMED_SECONDS = (0.3, 0.05)  # seconds per implementation, without and with --quick

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {"quick": options.quick, "emulated": options.emulated}
        self.record: Record = {"settings": settings, "machine": {}, "parts": {}, "cases": {}}
        self.emulated: bool = options.emulated
        self.quick: bool = options.quick
        self.parts: list[str] = options.parts
        self.case_names: list[str] | None = options.cases
        self.prebuilt: Path | None = options.prebuilt
        self.folder: Path = options.out
        self.timed_seconds = self.TIMED_SECONDS[options.quick]
        self._begin = time.monotonic()
        self._end = self._begin + options.seconds - RESERVE
        self._resumed = False
        self._noted: Record = {}  # status of the steps of this run
        self._measured: list[str] = []
        self._worker = CurrentProcess() if self.emulated else SeparateProcess()

    def left(self) -> float:
        return self._end - time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def job(self, into: Record, target: str, *arguments: Any, seconds: float, fresh: bool = False) -> Failed | None:
        """Runs a job and merges its pieces into `into`. If it fails, the reason is added to `into` and returned.

        fresh: start a new process.
        """
        if fresh:
            self._worker.stop()
        try:
            for piece in self._worker.run(target, *arguments, seconds=max(0.0, min(seconds, self.left()))):
                self.say(piece.pop("say", None))
                merge(into, piece)
                self.write()
        except Failed as error:
            into["stopped" if isinstance(error, TimedOut) else "failed"] = str(error)
            self.say(str(error))
            self.write()
            return error
        return None

    def _resume(self) -> None:
        """Takes over the results of an earlier run on the same machine."""
        path = self.files()[0]
        if path.exists() and (earlier := json.loads(path.read_text()))["settings"] == self.record["settings"]:
            fill(self.record, earlier)
        self._resumed = True

    def say(self, text: str | None) -> None:
        if text:
            print(f"[{self.elapsed():3.0f} s] {text}", flush=True)

    def case(self, name: str) -> Record:
        """A new, empty record of a case."""
        self._measured.append(name)
        self.record["cases"][name] = {}
        return self.record["cases"][name]

    def note(self, step: str, found: Record) -> None:
        """Records the status of a step."""
        self._noted[step] = self.record["parts"][step] = found

    def failed(self) -> bool:
        """Whether a step of this run has failed, or a result of maml_cuda failed or is unverified."""
        if "gpu" not in self.record["machine"] or any(step["status"] == "failed" for step in self._noted.values()):
            return True
        cases = [self.record["cases"][name] for name in self._measured]
        results = [result for case in cases for result in case.get("implementations", {}).values()]
        return any(r["method"] == MAML_CUDA and (r["status"] == "failed" or "unverified" in r) for r in results)

    def close(self) -> None:
        self._worker.stop()

    def files(self) -> list[Path]:
        """The paths of the JSON and the Markdown file; none before the name of the device is known."""
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

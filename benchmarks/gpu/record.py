"""What was found, and how much time is left: written to disk after every job, so that nothing measured is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..files import replace, slug
from ..worker import Apart, Failed, Here
from .table import markdown

Record = dict[str, Any]


def merge(into: Record, piece: Record) -> None:
    """Adds a piece, dictionaries inside dictionaries included."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


class Run:
    """One run of the command.

    record: settings, machine, parts (status, seconds, reason), tests, sanitizer, facts, cases.
    """

    def __init__(self, settings: Record, folder: Path, total: float) -> None:
        self.record: Record = {"settings": settings, "machine": {}, "parts": {}, "cases": []}
        self.emulated: bool = settings["emulated"]
        self.quick: bool = settings["quick"]
        self.seconds: float = settings["seconds"]  # timed, of each side
        self.folder = folder
        self._begin = time.monotonic()
        self._end = self._begin + total
        self._worker = Here() if self.emulated else Apart()

    def left(self) -> float:
        return self._end - time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def job(self, into: Record, target: str, *arguments: Any, seconds: float) -> str | None:
        """Runs a job and merges its pieces into `into`; the reason in words if it failed, there too."""
        reason = None
        try:
            for piece in self._worker.run(target, *arguments, seconds=max(0.0, min(seconds, self.left()))):
                self.say(piece.pop("say", None))
                merge(into, piece)
        except Failed as error:
            reason = into["failed"] = str(error)
            self.say(f"failed: {reason}")
        self.write()
        return reason

    def say(self, text: str | None) -> None:
        if text:
            print(f"[{self.elapsed():3.0f} s] {text}", flush=True)

    def failed(self) -> bool:
        return "gpu" not in self.record["machine"] or any(
            part["status"] == "failed" for part in self.record["parts"].values()
        )

    def close(self) -> None:
        self._worker.stop()

    def files(self) -> list[Path]:
        """The JSON and the Markdown; none before the device has a name."""
        if "gpu" not in self.record["machine"]:
            return []
        name = slug(self.record["machine"]["gpu"]["name"])
        return [self.folder / f"{name}.json", self.folder / f"{name}.md"]

    def write(self) -> None:
        texts = (json.dumps(self.record, indent=2), markdown(self.record))
        for path, text in zip(self.files(), texts, strict=False):
            replace(path, text)

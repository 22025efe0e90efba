"""Measures the time of each part of an iteration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall-clock seconds of each part: physics, policy and gradient."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"physics": 0.0, "policy": 0.0, "gradient": 0.0}

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Adds the time in the context to the part ``what``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    def shares(self) -> dict[str, float]:
        """The share of each part in the total time."""
        total = sum(self.seconds.values()) or 1.0
        return {what: seconds / total for what, seconds in self.seconds.items()}

"""The times of two versions, taken in turn, so that other load on the machine slows both alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..markdown import markdown_table
from .cases import Case
from .version import started

ROUNDS = 20
WARM_UP = 0.1  # of the timed seconds
SLOWER = 1.01  # a ratio whose lower quartile is above this

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Times:
    """Of a case: for each round the median time of a step, in seconds, of OLD and of NEW."""

    isa: str
    case: Case
    through_autograd: bool
    old: list[float]
    new: list[float]

    @property
    def ratio(self) -> Quartiles:
        """Of NEW over OLD, round by round."""
        return quartiles([new / old for old, new in zip(self.old, self.new, strict=True)])

    @property
    def slower(self) -> bool:
        return self.ratio[0] > SLOWER


def quartiles(numbers: Sequence[float]) -> Quartiles:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
    return lower, median, upper


def alternate(folders: Sequence[Path], isa: str, case: Case, through_autograd: bool, seconds: float) -> Times:
    """OLD, NEW, OLD, NEW, ...: each for so many seconds in all, in processes of their own."""
    medians: list[list[float]] = [[], []]
    with started(folders, isa) as versions:
        for version in versions:
            version.prepare(case, through_autograd, seconds * WARM_UP)
        for _ in range(ROUNDS):
            for version, found in zip(versions, medians, strict=True):
                found.append(version.block(seconds / ROUNDS))
    return Times(isa, case, through_autograd, *medians)


COLUMNS = ("meta-step", "instruction set", "OLD, ms", "NEW, ms", "NEW / OLD", "")


def report(times: Iterable[Times]) -> str:
    """Medians and quartiles over the rounds; what is slower is marked."""
    return "\n".join(markdown_table(COLUMNS, map(row, times)))


def row(times: Times) -> list[str]:
    name = f"{times.case}{', through autograd' if times.through_autograd else ''}"
    old, new = (cell([t * 1e3 for t in quartiles(side)]) for side in (times.old, times.new))
    return [name, times.isa, old, new, cell(times.ratio), "**slower**" if times.slower else ""]


def cell(numbers: Sequence[float]) -> str:
    lower, median, upper = (f"{number:.4g}" for number in numbers)
    return f"{median} ({lower} to {upper})"

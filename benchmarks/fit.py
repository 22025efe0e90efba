"""Whether the cost of a meta-step is linear in T and K: least squares through its medians."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .entrants import OURS

Case = dict[str, Any]
LINEAR = {"T": "a task", "K": "an inner step"}  # axes along which the FLOP are affine


@dataclass(frozen=True)
class Line:
    """ms = start + slope * value."""

    start: float
    slope: float
    off: float  # the largest distance of a point, as a share of the point

    def __call__(self, value: float) -> float:
        return self.start + self.slope * value


def line(growth: Sequence[Case], axis: str) -> Line | None:
    """Through our times along an axis; None with fewer than three points, through which a line says nothing."""
    points = [
        (case["value"], case["sides"][OURS]["wall_ms"]["median"])
        for case in growth
        if case["axis"] == axis and case["sides"][OURS]["status"] == "timed"
    ]
    if len(points) < 3:
        return None
    fitted = statistics.linear_regression(*zip(*points, strict=True))
    found = Line(fitted.intercept, fitted.slope, 0)
    return Line(found.start, found.slope, max(abs(found(x) - y) / y for x, y in points))


def lines(growth: Sequence[Case]) -> Iterator[str]:
    """A line of the report for each axis."""
    for axis, unit in LINEAR.items():
        if found := line(growth, axis):
            yield (
                f"- Cost in {axis}: {found.start:.3g} ms + {found.slope:.3g} ms {unit} (least squares; "
                f"the farthest point is {found.off:.0%} off)."
            )

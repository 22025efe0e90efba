"""Whether the time of a meta-step is linear in T and K: a least-squares fit to the median times."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .implementations import MAML_CUDA

Case = dict[str, Any]
UNITS = {"T": "per task", "K": "per inner step"}  # the axes in which the FLOP count is affine


@dataclass(frozen=True)
class Line:
    """ms = intercept + slope * value."""

    intercept: float
    slope: float
    max_error: float  # the largest distance of a point from the line, relative to the point

    def __call__(self, value: float) -> float:
        return self.intercept + self.slope * value


def line(growth: Sequence[Case], axis: str) -> Line | None:
    """The fit to the times of maml_cuda along an axis. None for fewer than three points."""
    points = [
        (case["value"], case["sides"][MAML_CUDA]["wall_ms"]["median"])
        for case in growth
        if case["axis"] == axis and case["sides"][MAML_CUDA]["status"] == "timed"
    ]
    if len(points) < 3:
        return None
    fitted = statistics.linear_regression(*zip(*points, strict=True))
    found = Line(fitted.intercept, fitted.slope, 0)
    return Line(found.intercept, found.slope, max(abs(found(x) - y) / y for x, y in points))


def lines(growth: Sequence[Case]) -> Iterator[str]:
    """One line of the report per axis."""
    for axis, unit in UNITS.items():
        if found := line(growth, axis):
            yield (
                f"- Time against {axis}: {found.intercept:.3g} ms + {found.slope:.3g} ms {unit} (least squares; "
                f"largest relative error {found.max_error:.0%})."
            )

"""What a second-order meta-step costs as T, K and the width of the net grow, from the Omniglot workload."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from .workloads import WORKLOADS, OmniglotNet, Workload

BASE = WORKLOADS["omniglot"]
AXES = {"T": (1, 2, 4, 8, 16, 32), "K": (1, 2, 3, 5, 8, 12), "width": (16, 32, 64, 128)}
QUICK = 2  # values of each axis in a quick run


def points(quick: bool) -> Iterator[tuple[str, int, Workload]]:
    """Axis, value, workload."""
    for axis, values in AXES.items():
        for value in values[:QUICK] if quick else values:
            base = BASE.shrunk() if quick else BASE
            yield axis, value, dataclasses.replace(base, name=f"omniglot, {axis}={value}", **change(axis, value))


def change(axis: str, value: int) -> dict[str, object]:
    if axis == "T":
        return {"tasks": value}
    if axis == "K":
        return {"inner_steps": value}
    return {"model": partial(OmniglotNet, 5, filters=value)}

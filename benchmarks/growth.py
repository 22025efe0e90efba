"""How the time of a second-order meta-step grows with T, K and the width of the network; based on `omniglot`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from .workloads import WORKLOADS, OmniglotNet, Workload

BASE = WORKLOADS["omniglot"]
AXES = {"T": (1, 2, 4, 8, 16, 32), "K": (1, 2, 3, 5, 8, 12), "width": (16, 32, 64, 128)}
QUICK_VALUES = 2  # values per axis in a quick run


def points(quick: bool) -> Iterator[tuple[str, int, Workload]]:
    """Yields (axis, value, workload)."""
    for axis, values in AXES.items():
        for value in values[:QUICK_VALUES] if quick else values:
            base = BASE.shrunk() if quick else BASE
            yield axis, value, dataclasses.replace(base, name=f"omniglot, {axis}={value}", **change(axis, value))


def change(axis: str, value: int) -> dict[str, object]:
    """The field of the workload that an axis changes."""
    if axis == "T":
        return {"tasks": value}
    if axis == "K":
        return {"inner_steps": value}
    return {"model": partial(OmniglotNet, 5, filters=value)}

"""The two plots: speed-up by workload, and what a meta-step costs as T, K and the width of the net grow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .entrants import OURS, RIVALS
from .fit import LINEAR, line

Case = dict[str, Any]
# Told apart with every colour vision (Okabe and Ito), ours black.
COLOURS = dict(
    zip(
        (OURS, *RIVALS),
        ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"),
        strict=True,
    )
)
UNITS = {"T": "tasks T", "K": "inner steps K", "width": "filters of each convolution"}


def speed_up(cases: Sequence[Case], path: Path) -> None:
    """How many times our time each rival takes, second order: a row a workload, a point a rival."""
    cases = [case for case in cases if case["order"] == 2 and case["sides"][OURS]["status"] == "timed"]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for name in RIVALS:
        points = [
            (median(case["sides"][name]) / median(case["sides"][OURS]), row)
            for row, case in enumerate(cases)
            if case["sides"].get(name, {}).get("status") == "timed"
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[name], markeredgecolor="black", label=name)
    axes.axvline(1, color=COLOURS[OURS], label=OURS)
    axes.set(xscale="log", xlabel=f"time of a second-order meta-step, in times that of {OURS}")
    axes.set_yticks(range(len(cases)), [case["workload"] for case in cases])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def growth(cases: Sequence[Case], path: Path) -> None:
    """Milliseconds against T, K and width, with the FLOP floor, and lines in T and K through ours."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(UNITS)), UNITS, strict=True):
        own = [case for case in cases if case["axis"] == axis]
        for name in dict.fromkeys(name for case in own for name in case["sides"]):
            timed = [case for case in own if case["sides"][name]["status"] == "timed"]
            times = [median(case["sides"][name]) for case in timed]
            axes.plot([case["value"] for case in timed], times, "o-", color=COLOURS[name], label=name, markersize=4)
        floors = [case["floor_ms"] for case in own]
        axes.plot([case["value"] for case in own], floors, ":", color="#777777", label="FLOP at the rate of sgemm")
        if axis in LINEAR and (fitted := line(cases, axis)):
            values = [case["value"] for case in own]
            label = f"{fitted.start:.3g} + {fitted.slope:.3g} {axis} ms"
            axes.plot(values, [fitted(value) for value in values], "--", color=COLOURS[OURS], label=label, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=UNITS[axis])
        ticks = [case["value"] for case in own]
        axes.set_xticks(ticks, [str(value) for value in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms, second order")
    for axes in figure.axes[:2]:
        axes.legend(fontsize=8)
    save(figure, path)


def median(side: dict[str, Any]) -> float:
    return side["wall_ms"]["median"]


def save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    path.write_bytes(content.getvalue())

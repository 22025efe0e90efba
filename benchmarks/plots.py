"""The two plots of a run: speed-up by workload, and time against T, K and the width of the network."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .fit import UNITS, line
from .implementations import BASELINES, MAML_CUDA

Case = dict[str, Any]
# Distinguishable with colour blindness (palette of Okabe and Ito); maml_cuda is black.
COLOURS = dict(
    zip(
        (MAML_CUDA, *BASELINES),
        ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"),
        strict=True,
    )
)
LABELS = {"T": "tasks T", "K": "inner steps K", "width": "filters of each convolution"}


def speed_up(cases: Sequence[Case], path: Path) -> None:
    """Time of each baseline relative to maml_cuda at second order: one row per workload, one point per baseline."""
    cases = [case for case in cases if case["order"] == 2 and case["sides"][MAML_CUDA]["status"] == "timed"]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for name in BASELINES:
        points = [
            (median(case["sides"][name]) / median(case["sides"][MAML_CUDA]), row)
            for row, case in enumerate(cases)
            if case["sides"].get(name, {}).get("status") == "timed"
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[name], markeredgecolor="black", label=name)
    axes.axvline(1, color=COLOURS[MAML_CUDA], label=MAML_CUDA)
    axes.set(xscale="log", xlabel=f"time of a second-order meta-step relative to {MAML_CUDA}")
    axes.set_yticks(range(len(cases)), [case["workload"] for case in cases])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def growth(cases: Sequence[Case], path: Path) -> None:
    """Time in ms against T, K and width, the time at the sgemm rate, and linear fits in T and K for maml_cuda."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(LABELS)), LABELS, strict=True):
        own = [case for case in cases if case["axis"] == axis]
        for name in dict.fromkeys(name for case in own for name in case["sides"]):
            timed = [case for case in own if case["sides"][name]["status"] == "timed"]
            times = [median(case["sides"][name]) for case in timed]
            axes.plot([case["value"] for case in timed], times, "o-", color=COLOURS[name], label=name, markersize=4)
        floors = [case["floor_ms"] for case in own]
        axes.plot([case["value"] for case in own], floors, ":", color="#777777", label="FLOP at the sgemm rate")
        if axis in UNITS and (fitted := line(cases, axis)):
            values = [case["value"] for case in own]
            label = f"{fitted.intercept:.3g} + {fitted.slope:.3g} {axis} ms"
            axes.plot(
                values, [fitted(value) for value in values], "--", color=COLOURS[MAML_CUDA], label=label, linewidth=1
            )
        axes.set(xscale="log", yscale="log", xlabel=LABELS[axis])
        ticks = [case["value"] for case in own]
        axes.set_xticks(ticks, [str(value) for value in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms, second order")
    for axes in figure.axes[:2]:
        axes.legend(fontsize=8)
    save(figure, path)


def median(result: dict[str, Any]) -> float:
    return result["wall_ms"]["median"]


def save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    path.write_bytes(content.getvalue())

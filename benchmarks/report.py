"""The report: the machine, a Markdown table, what we lose, and the ratio of second to first order."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import maml_cuda

from .case import OURS

Case = dict[str, Any]


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maml_cuda": maml_cuda.build_info(),
        "commit": commit(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The short hash of this checkout, marked where tracked files differ from it; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(record: dict[str, Any]) -> str:
    """The whole report of `{"machine", "settings", "cases"}` as Markdown."""
    return "\n".join(
        [
            *heading(record),
            "",
            *table(record["cases"]),
            "",
            *losses(record["cases"]),
            *overhead(record["cases"]),
            *order_ratios(record["cases"]),
        ]
    )


def heading(record: dict[str, Any]) -> Iterator[str]:
    where, settings = record["machine"], record["settings"]
    build = where["maml_cuda"]
    yield (
        f"One meta-step on {where['cpu']}, {where['threads']} of {where['cores']} cores; "
        f"torch {where['torch']}, maml_cuda {build['version']} ({build['cpu_isa']}), "
        f"commit {where['commit'] or 'unknown'}."
    )
    yield (
        "Wall time in ms: median (lower to upper quartile), interleaved rounds in one process; CPU is our "
        "process time. Floor is the share of our time that the step's FLOP take at the rate of the machine's "
        "sgemm, measured beside it."
    )
    if settings["quick"]:
        yield "**Quick run: shapes cut; it shows that everything works, its times mean nothing.**"


def table(cases: Sequence[Case]) -> Iterator[str]:
    rivals = list(dict.fromkeys(name for case in cases for name in case["sides"] if name != OURS))
    columns = ["workload", "order", "K", "T", OURS, *rivals, "speed-up", "CPU ms", "floor", "float64 error"]
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(columns) - 1)])} |"
    for case in cases:
        ours = case["sides"][OURS]
        timed = ours["status"] == "timed"
        cells = [
            case["workload"],
            str(case["order"]),
            str(case["inner_steps"]),
            str(case["tasks"]),
            time_cell(ours),
            *(time_cell(case["sides"][name]) if name in case["sides"] else "" for name in rivals),
            f"{case['speed_up']:.2f}x" if case["speed_up"] else "",
            number(ours["cpu_ms"]) if timed else "",
            f"{ours['floor_fraction']:.0%}" if timed else "",
            f"{ours['error_float64']:.0e}" if timed else "",
        ]
        yield f"| {' | '.join(cells)} |"


def time_cell(side: dict[str, Any]) -> str:
    if side["status"] != "timed":
        return f"**{side['status']}**"
    wall = side["wall_ms"]
    return f"{number(wall['median'])} ({number(wall['q1'])} to {number(wall['q3'])})"


def number(value: float) -> str:
    """Three significant digits, in full from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def losses(cases: Sequence[Case]) -> Iterator[str]:
    """Where a rival is ahead, and every side that was refused."""
    lost = [case for case in cases if case["speed_up"] is not None and case["speed_up"] < 1]
    for case in lost:
        yield f"- We lose: {title(case)}, {1 / case['speed_up']:.2f}x slower than {case['fastest_rival']}."
    compared = [case for case in cases if case["speed_up"] is not None]
    if compared and not lost:
        yield f"- We lose none of the {len(compared)} cases compared."
    for case in cases:
        for name, side in case["sides"].items():
            if side["status"] != "timed":
                yield f"- Not timed: {title(case)}, {name} {side['status']}: {side['reason']}"


def overhead(cases: Sequence[Case]) -> Iterator[str]:
    """The case with almost no arithmetic, in microseconds: what Python costs a call, core included."""
    for case in cases:
        ours = case["sides"][OURS]
        if case["workload"] == "overhead" and ours["status"] == "timed":
            time = f"{ours['wall_ms']['median'] * 1e3:.0f} us"
            yield f"- A call and its backward with almost nothing to compute, order {case['order']}: {time}."


def order_ratios(cases: Sequence[Case]) -> Iterator[str]:
    """Second order over first order, in time and in FLOP, for each workload that ran at both."""
    by_key = {(case["workload"], case["order"]): case for case in cases}
    for (workload, order), second in by_key.items():
        first = by_key.get((workload, 1))
        if order != 2 or first is None:
            continue
        times = [
            f"{name} {second['sides'][name]['wall_ms']['median'] / side['wall_ms']['median']:.2f}"
            for name, side in first["sides"].items()
            if side["status"] == second["sides"][name]["status"] == "timed"
        ]
        flops = f"FLOP {second['flops'] / first['flops']:.2f}"
        yield f"- Second over first order, {workload}: {', '.join([flops, *times])}."


def title(case: Case) -> str:
    return f"{case['workload']}, order {case['order']}"

"""The results of finished runs, ``docs/results.json``: cell name -> the kept part of its summary.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import replace
from . import protocols
from .cells import CELLS

KEPT = ("metric", "steps", "mean", "ci95", "reported", "ensemble", "test_tasks", "test_shots", "test_queries")
KEPT += (
    "protocols",
    "batch_norm",
    "meta_iterations",
    "seconds",
    "cpu_seconds",
    "backend",
    "threads",
    "commit",
    "machine",
    "curve",
)
POINTS = 40  # at most, per learning curve


def summaries(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The summaries of all runs in the folders, each a run or a folder of runs. FileNotFoundError if one has none."""
    found = []
    for run in (run for folder in folders for run in finished(folder)):
        summary = json.loads((run / "summary.json").read_text())
        found.append(summary | _curve(run / "metrics.csv") | protocols.of_run(run, summary))
    return found


def finished(folder: Path) -> list[Path]:
    """The finished runs in a folder, which is one or holds some. FileNotFoundError if there are none."""
    paths = sorted(folder.glob("summary.json")) or sorted(folder.glob("*/summary.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} must be a run or a folder of runs, with summary.json, got none")
    return [path.parent for path in paths]


def _curve(metrics: Path) -> dict[str, Any]:
    """``curve``: (iteration, mean score) for at most POINTS groups of validations; {} without validations."""
    if not metrics.exists():
        return {}
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation"]]
    size = -(-len(rows) // POINTS) or 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    means = [round(sum(float(row["validation"]) for row in group) / len(group), 5) for group in groups]
    points = [[int(group[-1]["iteration"]), mean] for group, mean in zip(groups, means, strict=True)]
    return {"curve": points} if points else {}


def merged(results: dict[str, Any], runs: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Adds runs to the results. Returns the results, ordered like the tables, and the runs that belong to no cell.

    A run belongs to the cell with its settings. A later run replaces an earlier one.
    """
    results, unknown = dict(results), []
    for run in runs:
        settings = run["settings"]
        name = next((name for name, cell in CELLS.items() if cell.is_of(settings)), None)
        if name is None:
            unknown.append(f"{settings.get('job')} {settings.get('preset', '')}".strip())
            continue
        kept = {key: run[key] for key in KEPT if key in run}
        results[name] = kept | {"torch": run["versions"]["torch"]}
    return {name: results[name] for name in CELLS if name in results}, unknown


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def save(results: dict[str, Any], path: Path) -> None:
    replace(path, json.dumps(results, indent=1))

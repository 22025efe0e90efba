"""The page ``docs/results.md``: the result of every cell, or the command that produces it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from math import hypot
from typing import Any

from .cells import TABLES, Cell, Table

HEAD = (
    "# Results\n\n"
    "Cells of the tables of published papers. `python -m benchmarks.paper` writes this page from the `summary.json` of "
    "runs, and keeps their figures in `docs/results.json`. Each cell is one command:\n\n"
    "- `python -m benchmarks.paper --list` prints all commands;\n"
    "- `python -m benchmarks.paper --run CELL` runs one and updates this page. A run that was interrupted goes on;\n"
    "- `python -m benchmarks.paper RUNS` takes in runs that were started by hand;\n"
    "- `python -m benchmarks.paper --protocols RUNS` tests finished runs in three more ways first, which the Omniglot "
    "table shows;\n"
    "- `python -m benchmarks.paper.curve --side maml_cuda --data FOLDER --out FOLDER`, and then with "
    "`--side learn2learn`, draws accuracy against time from the same weights and episodes.\n\n"
    "A score is the mean over 600 test tasks that training has not seen, of the checkpoint that validated best, ± half "
    "the width of the 95 % interval (1.96 sd/√n). BatchNorm is transductive, also in the test: it normalises with the "
    "statistics of the set at hand. Wall times include whatever else ran on the machine. CPU times are those of all "
    "threads of the run alone. Neither includes the final test."
)


def markdown(
    results: dict[str, Any], sinusoid: str | None = None, learning: str | None = None, omniglot: str | None = None
) -> str:
    """The page. ``sinusoid``, ``learning``, ``omniglot``: paths of the figures (figures.py), relative to the page."""
    parts = [HEAD]
    for table in TABLES:
        parts.append(f"## {table.title}")
        if table.note:
            parts.append(table.note)
        filled = [cell for cell in table.cells if cell.name in results]
        if filled:
            parts.append("\n".join(_rows(table, filled, results)))
        missing = [cell for cell in table.cells if cell.name not in results]
        if missing:
            parts.append("\n".join(_commands(table, missing)))
        if finding := _orders(table, results):
            parts.append(finding)
        if table.protocols and (finding := _transduction(filled, results)):
            parts.append(finding)
    for figure, text, before in (
        (sinusoid, "MSE against adaptation steps", "## Characters"),
        (learning, "Validation accuracy against meta-iterations", "## Omniglot"),
        (omniglot, "Validation accuracy on Omniglot against meta-iterations", "## mini-ImageNet"),
    ):
        if figure:
            at = next(i for i, part in enumerate(parts) if part.startswith(before))
            parts.insert(at, f"![{text}]({figure})")
    parts.append("\n".join(_machines(results)))
    return "\n\n".join(part.strip() for part in parts)


def _rows(table: Table, cells: Iterable[Cell], results: dict[str, Any]) -> list[str]:
    steps = [f"{count} step{'s' * (count != 1)}" for count in table.steps]
    head = ["", *(steps or ["maml_cuda"]), table.published_heading, "test steps", "wall, min", "CPU, min", "commit"]
    if steps:
        head.remove("test steps")
    if table.protocols:
        head[1:2] = ["15 queries", "authors' queries", "support", "running"]
        head.insert(head.index("wall, min"), "iterations")
    return _table(head, [_row(table, cell, results[cell.name]) for cell in cells])


def _row(table: Table, cell: Cell, run: dict[str, Any]) -> list[str]:
    if table.steps:
        scores = [_at(run, count) for count in table.steps]
    else:
        scores = [_score(run, run["reported"])]
    published = " / ".join(cell.published) or "–"
    if cell.source:
        published += f" ({cell.source})"
    cost = [f"{run[key] / 60:.1f}" if run["meta_iterations"] else "–" for key in ("seconds", "cpu_seconds")]
    test = [] if table.steps else [str(run["reported"]["steps"]) if len(run["steps"]) > 1 else "–"]
    row = cell.row
    if "ensemble" in run:
        row += f", ensemble of {len(run['ensemble']['iterations'])}"
        scores = [f"{_score(run, run['ensemble']['reported'])} (best single: {scores[0]})"]
    if run["batch_norm"] != "transductive":
        row += f", {run['batch_norm']} BatchNorm"
    if table.protocols:
        tested = run.get("protocols", {})
        scores += [_score(run, tested[name]) if name in tested else "–" for name in ("authors", "support", "running")]
        test.append(f"{run['meta_iterations']:,} of {cell.full_iterations:,}" if run["meta_iterations"] else "–")
    return [row, *scores, published, *test, *cost, f"`{run['commit']}`"]


def _at(run: dict[str, Any], count: int) -> str:
    """The score after ``count`` steps; for methods without adaptation, their only score."""
    row = run["steps"].index(count) if count in run["steps"] else 0
    return _score(run, {"mean": run["mean"][row], "ci95": run["ci95"][row]})


def _score(run: dict[str, Any], at: dict[str, float]) -> str:
    if run["metric"] == "accuracy":
        return f"{100 * at['mean']:.1f} ± {100 * at['ci95']:.1f}"
    return f"{at['mean']:.3f} ± {at['ci95']:.3f}"


def _commands(table: Table, cells: Iterable[Cell]) -> list[str]:
    """The cells without a result, each with its command."""
    cells = list(cells)
    why = "needs your copy of the data" if cells[0].needs_data else "not run yet"
    lines = [
        [cell.row, " / ".join(cell.published) or "–", cell.source, f"`maml-cuda {shlex.join(cell.command)}`"]
        for cell in cells
    ]
    return _table([why, table.published_heading, "", "command"], lines)


def _orders(table: Table, results: dict[str, Any]) -> str:
    """For each task of the table, whether second order is better than first order."""
    if table.steps:
        return ""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for cell in table.cells:
        if cell.name in results:
            task = scores.setdefault(cell.name.removesuffix(f"-{cell.preset}"), {})
            task[cell.preset] = results[cell.name]["reported"]
    pairs = [(name, of["maml"], of["fomaml"]) for name, of in scores.items() if {"maml", "fomaml"} <= of.keys()]
    return "\n\n".join(f"{name}: {_verdict(second, first)}" for name, second, first in pairs)


def _transduction(cells: Iterable[Cell], results: dict[str, Any]) -> str:
    """How much of each accuracy is transduction."""
    shares = []
    for cell in cells:
        run = results[cell.name]
        if "support" in (tested := run.get("protocols", {})):
            together = run.get("ensemble", run)["reported"]["mean"]
            shares.append(f"{cell.row} {100 * (together - tested['support']['mean']):+.1f}")
    if not shares:
        return ""
    return f"What transduction adds, in points (15 queries less support): {'; '.join(shares)}."


def _verdict(second: dict[str, float], first: dict[str, float]) -> str:
    gain = 100 * (second["mean"] - first["mean"])
    width = 100 * hypot(second["ci95"], first["ci95"])
    if gain > width:
        verdict = "Second order is better than first order"
    elif gain < -width:
        verdict = "Second order is **worse** than first order"
    else:
        verdict = "Second order and first order do **not** differ beyond the intervals"
    return f"{verdict}: {gain:+.1f} ± {width:.1f} points (one run each; the interval covers the test tasks only)."


def _machines(results: dict[str, Any]) -> list[str]:
    """The machines and software of the runs."""
    groups: dict[str, list[str]] = {}
    for name, run in results.items():
        where = f"{run['machine']}, {run['threads']} threads, torch {run['torch']}, {run['backend']}"
        groups.setdefault(where, []).append(name)
    return ["## Machines", "", *(f"- {where}: {', '.join(names)}" for where, names in groups.items())]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows)]

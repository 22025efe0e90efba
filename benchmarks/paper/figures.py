"""The figures of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .cells import TABLES, Cell


def adaptation(results: dict[str, Any], path: Path) -> bool:
    """Figures 3 and 6 of the paper: MSE against adaptation steps, one panel per shot count. False without results."""
    tables = [t for t in TABLES if t.steps and any(cell.name in results for cell in t.cells)]
    if not tables:
        return False
    figure = Figure(figsize=(4 * len(tables), 3.6), layout="constrained")
    colours = {"maml": "#0072B2", "pretrained": "#D55E00", "oracle": "#009E73", "random": "#777777"}
    for axes, table in zip(figure.subplots(1, len(tables), sharey=True, squeeze=False)[0], tables, strict=True):
        for cell in table.cells:
            if (run := results.get(cell.name)) is None:
                continue
            if len(run["steps"]) == 1:
                axes.axhline(run["mean"][0], color=colours[cell.preset], label=cell.row)
            else:
                error = {"yerr": run["ci95"], "capsize": 2}
                axes.errorbar(run["steps"], run["mean"], color=colours[cell.preset], label=cell.row, **error)
        axes.set(title=table.title.split(":")[0], xlabel="adaptation steps", ylabel="MSE", ylim=(0, 5))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)
    return True


def learning(results: dict[str, Any], path: Path) -> bool:
    """Validation accuracy against meta-iterations of the runs on glyphs, one panel per table. False without results."""
    tables = [t for t in TABLES if any(cell.job == "glyphs" and _curve(results, cell.name) for cell in t.cells)]
    if not tables:
        return False
    figure = Figure(figsize=(5 * len(tables), 4.2), layout="constrained")
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        for number, cell in enumerate(table.cells):
            if curve := _curve(results, cell.name):
                iterations, scores = zip(*curve, strict=True)
                accuracies = [100 * score for score in scores]
                axes.plot(iterations, accuracies, f"C{number}", label=cell.row, linewidth=1.2)
        title = table.title.removeprefix("Characters, ").split(":")[0]
        axes.set(title=f"glyphs, {title}", xlabel="meta-iteration", ylabel="validation accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)
    return True


def omniglot(results: dict[str, Any], path: Path) -> bool:
    """Validation accuracy against meta-iterations of the runs on Omniglot, one panel per task. False without any."""
    panels: dict[str, list[Cell]] = {}
    for cell in (cell for table in TABLES for cell in table.cells):
        if cell.job == "omniglot" and _curve(results, cell.name):
            panels.setdefault(cell.row.split(", ")[1], []).append(cell)
    if not panels:
        return False
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    for axes, (task, cells) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, cell in enumerate(cells):
            iterations, scores = zip(*_curve(results, cell.name), strict=True)
            label = cell.row.replace(f", {task}", "")
            axes.plot(iterations, [100 * score for score in scores], f"C{number}", label=label, linewidth=1.2)
        axes.set(title=f"Omniglot, {task}", xlabel="meta-iteration", ylabel="validation accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)
    return True


def _curve(results: dict[str, Any], name: str) -> list[tuple[int, float]]:
    return results.get(name, {}).get("curve", [])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=100)

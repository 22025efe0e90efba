"""The plots of a reinforcement-learning run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from maml_cuda.rl.own_jobs import short_name
from maml_cuda.rl.sampling import Episodes
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train.plots import BLUE, GREEN, ORANGE, save

MOST_EPISODES = 10  # greatest number of paths per task


def learning_curve(metrics: Path, path: Path, settings: RLSettings) -> None:
    """Plots the returns of metrics.csv against the meta-iteration: before and after adaptation, and in validation."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines = (
        ("before", "training, before adaptation", ORANGE, "-"),
        ("after", "training, after adaptation", BLUE, "-"),
        ("validation", "validation", GREEN, "o-"),
    )
    for column, label, colour, style in lines:
        points = [(int(row["iteration"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.2, markersize=3)
    axes.set(xlabel="meta-iteration", ylabel="return", title=f"{short_name(settings.job)}: learning curve")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save(figure, path)


def paths(goals: Tensor, found: Sequence[Episodes], path: Path) -> None:
    """Plots the paths of navigation: one column per task, one row per number of adaptation steps. The circle is the
    goal.
    """
    figure = Figure(figsize=(2.4 * len(goals), 2.4 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(goals), squeeze=False)
    for step, episodes in enumerate(found):
        for task, goal in enumerate(goals.tolist()):
            axes = grid[step, task]
            for episode in range(min(MOST_EPISODES, episodes.alive.shape[1])):
                length = int(episodes.alive[task, episode].sum())
                x, y = episodes.observations[task, episode, :length, :2].T.tolist()
                axes.plot(x, y, color=BLUE, linewidth=0.6, alpha=0.6)
            axes.add_patch(Circle(goal, 0.04, color=ORANGE, zorder=3))
            axes.plot(0, 0, "k+")
            axes.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{step} step{'s' * (step != 1)}: {episodes.returns[task].mean():.1f}", fontsize=9)
    figure.suptitle("Paths of unseen tasks by adaptation step, with their mean return")
    save(figure, path)

"""The plots of a run. They use matplotlib's objects instead of pyplot, which has shared state and may open windows."""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from maml_cuda.data import MetaBatch
from maml_cuda.data.sinusoid import X
from maml_cuda.rl.own_jobs import short_name
from maml_cuda.train.algorithms import Algorithm
from maml_cuda.train.checkpoint import write_file
from maml_cuda.train.settings import Settings, metric_name

# The palette of Okabe and Ito, which colour-blind people can distinguish.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, GREY, "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def learning_curves(metrics: Path, path: Path, settings: Settings) -> None:
    """Plots loss and score of metrics.csv against the meta-iteration."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = (
        (left, "loss", "training, after adaptation", GREY, "-"),
        (right, "before", "training, before adaptation", ORANGE, "-"),
        (right, "after", "training, after adaptation", BLUE, "-"),
        (right, "validation", "validation", GREEN, "o-"),
    )
    for axes, column, label, colour, style in lines:
        points = [(int(row["iteration"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.2, markersize=3)
    for axes, name in ((left, "query loss"), (right, metric_name(settings.job))):
        axes.set(xlabel="meta-iteration", ylabel=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        if name != "accuracy":
            axes.set_yscale("log")
    figure.suptitle(f"{settings.job}: learning curves")
    save(figure, path)


def adaptation(result: dict[str, Any], path: Path) -> None:
    """Plots the score after each number of adaptation steps with its 95 % interval, from ``report.test_run``."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(result["steps"], result["mean"], yerr=result["ci95"], fmt="o-", color=BLUE, capsize=3)
    axes.set(xlabel="adaptation steps", ylabel=result["metric"], xticks=result["steps"])
    axes.set_title(f"{result['task']}: {result['test_tasks']} test tasks, {result['test_shots']}-shot, 95 % interval")
    axes.grid(alpha=0.3)
    if result["metric"] == "accuracy":
        axes.set_ylim(0, 1)
    else:
        axes.set_ylim(bottom=0)
    save(figure, path)


def image_task(algorithm: Algorithm, batch: MetaBatch, steps: int, path: Path, most: int = 8) -> None:
    """Draws the first task of ``batch``: one row per class, with support images and up to ``most`` queries, marked
    right or wrong.
    """
    ways = int(batch.y_spt.max()) + 1
    logits = algorithm.predict(batch, steps)
    predicted = logits[0].argmax(-1).view(ways, -1)
    correct = (predicted == batch.y_qry[0].view(ways, -1)).float().mean()
    support = batch.x_spt[0].unflatten(0, (ways, -1))  # [ways, shots, channels, height, width]
    query = batch.x_qry[0].unflatten(0, (ways, -1))[:, :most]
    shots, queries = support.shape[1], query.shape[1]
    figure = Figure(figsize=(1 + 0.9 * (shots + queries + 0.3), 0.7 + 1.1 * ways), layout="constrained")
    grid = figure.subplots(ways, shots + 1 + queries, squeeze=False, width_ratios=[1] * shots + [0.3] + [1] * queries)
    for way in range(ways):
        for column, image in enumerate(support[way]):
            _image(grid[way, column], image, f"class {way + 1}", BLUE)
        grid[way, shots].axis("off")
        for column, image in enumerate(query[way]):
            answer = int(predicted[way, column])
            right = answer == way
            title = f"✓ {answer + 1}" if right else f"✗ {answer + 1}"
            _image(grid[way, shots + 1 + column], image, title, GREEN if right else ORANGE)
    figure.suptitle(
        f"A task of unseen classes: support (blue), queries with the predicted class\n"
        f"after {steps} steps, {float(correct):.0%} of its {predicted.numel()} queries right"
    )
    save(figure, path)


def comparison(results: Sequence[dict[str, Any]], labels: Sequence[str], path: Path) -> None:
    """Plots the score of one or several runs of a job after each number of adaptation steps, with its 95 % interval."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (result, label) in enumerate(zip(results, labels, strict=True)):
        axes.errorbar(
            result["steps"], result["mean"], yerr=result["ci95"], fmt="o-", capsize=3,
            color=COLOURS[index % len(COLOURS)], label=label,
        )  # fmt: skip
    axes.set(xlabel="adaptation steps", ylabel=results[0]["metric"], xticks=max((r["steps"] for r in results), key=len))
    axes.set_title(f"{short_name(results[0]['task'])}: {results[0]['test_tasks']} test tasks, 95 % interval")
    if results[0]["metric"] == "accuracy":
        axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    save(figure, path)


def predictions(
    answers: Sequence[tuple[Tensor, str, str, float]], path: Path, most: int = 60, columns: int = 10
) -> None:
    """Draws pictures with their predicted class and its probability.

    Args:
        answers: ``(picture, class, predicted class, probability)``; the class is empty where it is not known.
        path: of the PNG file.
        most: only the first so many pictures are drawn.
        columns: pictures in a row.
    """
    shown = answers[:most]
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(1.2 * columns, 4), 0.6 + 1.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(shown) :]:
        axes.axis("off")
    for axes, (picture, name, predicted, probability) in zip(grid, shown, strict=False):
        mark, colour = ("", BLUE) if not name else ("✓ ", GREEN) if name == predicted else ("✗ ", ORANGE)
        _image(axes, picture, f"{mark}{_short(predicted)}\n{probability:.0%}", colour)
    known = any(name for _, name, _, _ in shown)
    title = f"{len(shown)} of {len(answers)} pictures" if len(shown) < len(answers) else f"{len(answers)} pictures"
    figure.suptitle(f"{title}, predicted class and its probability{'; ✗ is wrong' * known}", fontsize=9)
    save(figure, path)


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def sinusoid_fits(algorithm: Algorithm, batch: MetaBatch, path: Path) -> None:
    """Plots the first task of ``batch``: the true curve, its support points, and the fit after 0, 1 and 10 steps."""
    x_spt, y_spt, x_qry, y_qry = (part[:1] for part in batch)
    grid = torch.linspace(*X, 200).view(1, -1, 1)
    on_grid = MetaBatch(x_spt, y_spt, torch.cat([grid, x_spt[:, :1, 1:].expand(-1, 200, -1)], -1), y_qry)
    order = x_qry[..., 0].flatten().argsort()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()

    def draw(x: Tensor, y: Tensor, style: str, **options: Any) -> None:
        axes.plot(x[..., 0].flatten().numpy(), y.detach().flatten().numpy(), style, **options)

    draw(x_qry[:, order], y_qry[:, order], "-", color=GREY, linewidth=4, alpha=0.4, label="truth")
    for steps, colour, style in ((0, ORANGE, ":"), (1, GREEN, "--"), (10, BLUE, "-")):
        if steps in algorithm.steps:
            fit = algorithm.predict(on_grid, steps)
            draw(grid, fit, style, color=colour, label=f"after {steps} step{'s' * (steps != 1)}")
    draw(x_spt, y_spt, "k^", label=f"{x_spt.shape[1]} support points")
    axes.set(xlabel="x", ylabel="y", title="sinusoid: a curve that training has not seen")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def _image(axes: Any, image: Tensor, title: str, colour: str) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)  # [height, width, 1 or 3]
    axes.set_title(title, fontsize=9, color=colour, parse_math=False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, completely or not at all."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
        figure.savefig(content, format="png", dpi=120)
    write_file(path, content.getvalue())

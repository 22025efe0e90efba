"""Accuracy against time, beside learn2learn's loop from the same weights and episodes.

    python -m benchmarks.paper.curve --side maml_cuda --minutes 60 --data FOLDER --out FOLDER
    python -m benchmarks.paper.curve --side learn2learn --minutes 60 --data FOLDER --out FOLDER

One call trains one side, so that nothing else runs beside it, and continues where an earlier call of this side stopped.
Both train 5-way 1-shot Omniglot with the settings of the preset ``maml``. ``SIDE.csv`` has the validation accuracies,
all on the same tasks, and ``curve.png`` the curves of both sides. Seconds are those of training; validation and the
start are not in them.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from maml_cuda.commands.shared_options import set_threads
from maml_cuda.data import MetaBatch
from maml_cuda.train.algorithms import Maml
from maml_cuda.train.devices import CPU
from maml_cuda.train.evaluate import evaluate
from maml_cuda.train.jobs import make_generator, make_tasks, new_settings, score
from maml_cuda.train.settings import Settings

from ..libraries import learn2learn_maml

LEVELS = (0.95, 0.98)  # accuracies whose times are printed
COLUMNS = ("iteration", "seconds", "validation")


class Learn2Learn(Maml):
    """The meta-steps of learn2learn's example. Validation is maml_cuda's on both sides."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        kind, _ = learn2learn_maml()
        self.learner: Any = kind(self.maml.model, lr=settings.inner_lr)

    def _gradients(self, batch: MetaBatch, iteration: int) -> tuple[Tensor, Tensor]:
        losses, logits = [], []
        for x_spt, y_spt, x_qry, y_qry in zip(*batch, strict=True):
            learner = self.learner.clone()
            for _ in range(self.settings.inner_steps):
                learner.adapt(F.cross_entropy(learner(x_spt), y_spt))
            logits.append(learner(x_qry))
            loss = F.cross_entropy(logits[-1], y_qry) / len(batch.x_spt)
            loss.backward()
            losses.append(loss.detach())
        measured = score(self.settings.job, torch.stack(logits).detach(), batch.y_qry).mean()
        return torch.stack(losses).sum(), measured


SIDES = {"maml_cuda": Maml, "learn2learn": Learn2Learn}


def train(side: str, settings: Settings, minutes: float, out: Path) -> list[dict[str, float]]:
    """Trains one side until its training has taken ``minutes`` or its iterations are done.

    Args:
        side: a key of SIDES.
        settings: of both sides; MAML without a schedule that its algorithm would need.
        minutes: of training in all calls together.
        out: the folder of ``SIDE.csv`` and ``SIDE.pt``, the state after its last row.

    Returns:
        The rows of ``SIDE.csv``.

    Raises:
        ValueError: the folder holds a side of other settings.
    """
    algorithm = SIDES[side](settings, CPU)
    generator, tasks = make_generator(settings, "train"), make_tasks(settings, "train")
    validation = make_tasks(settings, "validation")
    assert algorithm.optimizer is not None
    state, rows, kept = out / f"{side}.pt", read(out, side), replace(settings, iterations=1, data="", cache="")
    iteration, seconds = 0, 0.0
    if state.exists():
        stored = torch.load(state, weights_only=True)
        if stored["settings"] != repr(kept):
            raise ValueError(f"out must be a folder without a run of other settings, got {state}")
        algorithm.module.load_state_dict(stored["module"])
        algorithm.optimizer.load_state_dict(stored["optimizer"])
        generator.set_state(stored["generator"])
        iteration, seconds = stored["iteration"], stored["seconds"]
    rows = [row for row in rows if row["iteration"] <= iteration]
    out.mkdir(parents=True, exist_ok=True)
    while iteration < settings.iterations and seconds < 60 * minutes:
        started = time.perf_counter()
        for _ in range(min(settings.validation_interval, settings.iterations - iteration)):
            iteration += 1
            algorithm.step(tasks.sample(settings.meta_batch, generator), iteration)
        seconds += time.perf_counter() - started
        draws, number = make_generator(settings, "validation"), settings.validation_tasks
        scores = evaluate(algorithm.predictions, settings.job, validation, draws, number, [settings.test_steps])
        rows.append({"iteration": iteration, "seconds": seconds, "validation": scores.mean().item()})
        write(out, side, rows)
        content = {"module": algorithm.module.state_dict(), "optimizer": algorithm.optimizer.state_dict()}
        content |= {"generator": generator.get_state(), "iteration": iteration, "seconds": seconds}
        torch.save(content | {"settings": repr(kept)}, f"{state}.partial")
        os.replace(f"{state}.partial", state)
        print(f"{side}: iteration {iteration}, {seconds:.1f} s, {100 * rows[-1]['validation']:.2f} %", flush=True)
    return rows


def write(out: Path, side: str, rows: list[dict[str, float]]) -> None:
    with (out / f"{side}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read(out: Path, side: str) -> list[dict[str, float]]:
    """The rows of a side; none if it has not run."""
    path = out / f"{side}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]


def time_to(rows: list[dict[str, float]], level: float) -> float | None:
    """The seconds at the first validation of this accuracy; None if there is none."""
    return next((row["seconds"] for row in rows if row["validation"] >= level), None)


def words(side: str, rows: list[dict[str, float]]) -> str:
    times = ((level, time_to(rows, level)) for level in LEVELS)
    reached = [f"{100 * level:.0f} %: {'not reached' if t is None else f'{t / 60:.1f} min'}" for level, t in times]
    return f"{side} ({', '.join(reached)}; {rows[-1]['iteration']:,.0f} iterations)"


def draw(out: Path) -> None:
    """Writes ``curve.png`` from the CSV files that are there: against time, and against iterations."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    of_time, of_iterations = figure.subplots(1, 2, sharey=True)
    for side in SIDES:
        if rows := read(out, side):
            accuracy = [100 * row["validation"] for row in rows]
            of_time.plot([row["seconds"] / 60 for row in rows], accuracy, label=words(side, rows))
            of_iterations.plot([row["iteration"] for row in rows], accuracy, label=side)
    for axes, label in ((of_time, "wall time of training, min"), (of_iterations, "meta-iteration")):
        for level in LEVELS:
            axes.axhline(100 * level, color="#777777", linewidth=0.6)
        axes.set(xlabel=label, ylabel="validation accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(out / "curve.png", dpi=100)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.curve",
        description="Trains 5-way 1-shot Omniglot for some minutes on one side, and draws accuracy against time.",
    )
    add = parser.add_argument
    add("--side", choices=SIDES, required=True, help="what trains; it continues an earlier call")
    add("--minutes", type=float, default=60.0, metavar="N", help="of training, all calls together (default: 60)")
    add("--iterations", type=int, default=60_000, metavar="N", help="at most (default: 60000)")
    add("--validation-interval", type=int, default=100, metavar="N", help="iterations between rows (default: 100)")
    add("--data", required=True, metavar="FOLDER", help="folder of the data set")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for the CSV files and the picture")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    given = {"iterations": options.iterations, "validation_interval": options.validation_interval}
    settings = new_settings("omniglot", "maml", shots=1, data=options.data, **given)
    rows = train(options.side, settings, options.minutes, options.out)
    draw(options.out)
    if options.side == "learn2learn":
        print(f"learn2learn is {learn2learn_maml()[1]}")
    if rows:
        print(words(options.side, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The meta-training loop of ``maml-cuda train``, of any algorithm, resumable to the bit.

A run is one folder: ``metrics.csv``, the checkpoints ``last/`` and ``best/`` (and ``best-1/`` to ``best-N/``,
the N best ones in any order, where a setting asks for several), and what ``report.py`` adds at the end. Times
stand in the checkpoint and in summary.json, never in metrics.csv, so that an interrupted and resumed run leaves
the very file of one that was not.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from maml_cuda.algorithms import make_algorithm, meta_lr
from maml_cuda.checkpoint import (
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    write_file,
)
from maml_cuda.data import MetaBatch
from maml_cuda.evaluate import evaluate
from maml_cuda.jobs import Settings, classifies, make_generator, make_tasks, metric, score, show

COLUMNS = ("iteration", "loss", "before", "after", "validation")
# What a resumed run may set anew: none touches a number before it (the iterations do, where the outer rate is
# scheduled over them). The data may have moved, not changed.
MAY_CHANGE = ("iterations", "test_tasks", "data")


class Training:
    """A run between two meta-iterations: everything that a checkpoint holds."""

    columns: tuple[str, ...] = COLUMNS  # of metrics.csv

    def __init__(self, run: Path, settings: Settings) -> None:
        self.run = run
        self.settings = settings
        self.iteration = 0
        self.seconds = 0.0  # of wall time
        self.cpu_seconds = 0.0  # of all threads of this process
        # Of the best validations, the best first: iteration, score and, where several are kept, the checkpoint's name.
        self.bests: list[dict[str, Any]] = []
        self.running = torch.zeros(2)  # sums of loss and score since the last row of metrics.csv
        self._build()

    def _build(self) -> None:
        """Everything that is learned (``module``), optimizer, tasks and generator of the settings."""
        settings = self.settings
        self.algorithm = make_algorithm(settings)
        self.module = self.algorithm.module
        self.optimizer: Any = self.algorithm.optimizer  # None where nothing is learned
        self.tasks = self.algorithm.sampler(make_tasks(settings, "train"))
        self.validation_tasks = make_tasks(settings, "validation")
        make_tasks(settings, "test")  # so that what cannot be tested at the end is refused here
        self.generator = make_generator(settings, "train")

    @property
    def backend(self) -> str:
        """What runs."""
        return self.algorithm.backend

    @classmethod
    def start(cls, run: Path, settings: Settings) -> "Training":
        """A new run in a new folder. FileExistsError where ``run`` is anything but an empty folder."""
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise FileExistsError(
                f"{run} exists already: choose another --out, or continue that run with --resume {run}"
            )
        training = cls(run, settings)
        run.mkdir(parents=True, exist_ok=True)
        write_file(run / "metrics.csv", (",".join(cls.columns) + "\n").encode())
        training.save("last")
        return training

    @classmethod
    def resume(cls, run: Path, settings: Settings) -> "Training":
        """The run as its last checkpoint left it; rows of metrics.csv written after that are taken back."""
        model, tensors, info = load_checkpoint(run / "last")
        if settings.iterations < info["iteration"]:
            raise ValueError(
                f"iterations must be at least {info['iteration']}, which are done, got {settings.iterations}"
            )
        training = cls(run, settings)
        training.module.load_state_dict(model)
        load_optimizer(training.optimizer, tensors)
        training.generator.set_state(tensors["generator"])
        training.running = tensors["running"]
        training.iteration, training.bests = info["iteration"], info["bests"]
        training.seconds, training.cpu_seconds = info["seconds"], info["cpu_seconds"]
        lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
        # A row is kept whole or not at all: what a crash cut short lies after the checkpoint too.
        rows = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= training.iteration]
        write_file(run / "metrics.csv", "".join(lines[:1] + rows).encode())
        return training

    def save(self, name: str) -> None:
        """Writes the checkpoint ``last``, ``best`` or ``best-<n>``."""
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {"generator": self.generator.get_state(), "running": self.running}
        save_checkpoint(self.run / name, self.module.state_dict(), tensors, self._info())

    def _info(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "bests": self.bests,
            "settings": asdict(self.settings),
        }

    def loop(self) -> None:
        """Trains up to ``settings.iterations``. Ctrl-C saves first, then raises KeyboardInterrupt."""
        settings = self.settings
        with (
            (self.run / "metrics.csv").open("a") as metrics,
            _interrupt_flag() as interrupted,
            tqdm(total=settings.iterations, initial=self.iteration, unit="it", dynamic_ncols=True) as bar,
        ):
            started, cpu_started = time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds
            while self.iteration < settings.iterations:
                self.iteration += 1
                log = self.iteration % settings.log_interval == 0
                validate = self.iteration % settings.validation_interval == 0
                last = self.iteration == settings.iterations
                before = self._step(log)
                if log or validate or last or interrupted.is_set():
                    self._refuse_what_diverged()  # before it is saved
                row: dict[str, float] = {}
                if log:
                    row |= self._log(before, bar)
                if validate:
                    row["validation"] = self._validate(bar)
                if row:
                    cells = [f"{row[column]:.6g}" if column in row else "" for column in self.columns[1:]]
                    metrics.write(",".join([str(self.iteration), *cells]) + "\n")
                    metrics.flush()
                if validate or last or interrupted.is_set():
                    os.fsync(metrics.fileno())  # before the checkpoint that says these rows exist
                    self.seconds = time.perf_counter() - started
                    self.cpu_seconds = time.process_time() - cpu_started
                    self._save_bests()
                    self.save("last")
                if interrupted.is_set():
                    raise KeyboardInterrupt
            bar.update(self.iteration - bar.n)
        if not self.bests:  # fewer iterations than one validation interval
            self.save("best")

    def _save_bests(self) -> None:
        """Writes ``best`` and ``best-<n>`` where the validation of this iteration is among the best."""
        for rank, best in enumerate(self.bests):
            if best["iteration"] == self.iteration:
                if rank == 0:
                    self.save("best")
                if "checkpoint" in best:
                    self.save(best["checkpoint"])

    def _step(self, log: bool) -> Any:
        """One meta-iteration; where it is logged, returns the mean score of its tasks before adaptation, if it adapts
        to tasks."""
        settings = self.settings
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = meta_lr(settings, self.iteration)
        batch = self.tasks.sample(settings.meta_batch, self.generator)
        before = None
        if log and isinstance(batch, MetaBatch) and len(self.algorithm.steps) > 1:
            before = score(settings.job, self.algorithm.predict(batch, 0), batch.y_qry).mean()
        # Summed as tensors: no number leaves torch before a row is due.
        self.running += torch.stack(self.algorithm.step(batch, self.iteration))
        return before

    def _refuse_what_diverged(self) -> None:
        loss = self.running[0].item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss must be finite, got {loss} before iteration {self.iteration}: "
                "lower --meta-lr or --inner-lr; the last checkpoint is from before that"
            )

    def _log(self, before: Any, bar: tqdm) -> dict[str, float]:
        """The row of metrics.csv, with what ``_step`` returned: loss and score are means since the last row, the score
        before adaptation is one meta-batch's."""
        job = self.settings.job
        loss, after = (self.running / self.settings.log_interval).tolist()
        self.running.zero_()
        row = {"loss": loss, "after": after}
        scores = show(job, after)
        if before is not None:
            row["before"] = before.item()
            scores = f"{show(job, row['before'])} -> {scores}"
        bar.set_postfix_str(
            f"loss {loss:.3g}, {metric(job)} {scores}, {self._tasks_per_second(bar):.3g} tasks/s", refresh=False
        )
        bar.update(self.iteration - bar.n)
        return row

    def _tasks_per_second(self, bar: tqdm) -> float:
        elapsed = bar.format_dict["elapsed"]
        return (self.iteration - bar.initial) * self.settings.meta_batch / elapsed if elapsed else 0.0

    def _validate(self, bar: tqdm) -> float:
        """The mean score over 1..test_steps adaptation steps (without any, where none are taken); notes the best.

        The tasks are the same each time, so that validations differ by the model alone. The mean over all steps
        matters for the sinusoid: late in training one step still gains while ten begin to diverge on rare tasks.
        """
        settings = self.settings
        generator = make_generator(settings, "validation")
        steps = [count for count in self.algorithm.steps if 1 <= count <= settings.test_steps] or [0]
        scores = evaluate(
            self.algorithm.predictions,
            settings.job,
            self.validation_tasks,
            generator,
            settings.validation_tasks,
            steps,
        )
        mean = scores.double().mean().item()
        self._note(mean, rising=classifies(settings.job), kept=settings.best_checkpoints)
        over = f" over {steps[0]} to {steps[-1]} steps" if steps[-1] else ""
        bar.write(f"iteration {self.iteration}: validation {metric(settings.job)} {show(settings.job, mean)}{over}")
        return mean

    def _note(self, score: float, *, rising: bool, kept: int = 1) -> None:
        """Puts a validation among the ``kept`` best, behind its equals, into the checkpoint of the one that it drives
        out. ``rising``: more is better."""
        if not math.isfinite(score):
            return
        new: dict[str, Any] = {"iteration": self.iteration, "score": score}
        # sorted is stable
        self.bests = sorted([*self.bests, new], key=lambda best: -best["score"] if rising else best["score"])[:kept]
        if kept > 1 and new in self.bests:
            taken = {best.get("checkpoint") for best in self.bests}
            new["checkpoint"] = next(name for n in range(kept) if (name := f"best-{n + 1}") not in taken)


def resumed_settings(run: Path, given: dict[str, Any], kind: type = Settings) -> Any:
    """The settings (a ``kind``) of the run in ``run`` with those of ``given`` that a resumed run may change.

    FileNotFoundError where no run is, ValueError where ``given`` would make it another run.
    """
    stored = load_checkpoint(run / "last")[2]["settings"]
    may_change = MAY_CHANGE if stored.get("meta_schedule", "constant") == "constant" else MAY_CHANGE[1:]
    for name, value in given.items():
        if name not in may_change and stored[name] != value:
            raise ValueError(f"{name} must stay {stored[name]} in the resumed run {run}, got {value}")
    return kind(**(stored | given))


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Ctrl-C sets the flag that is yielded; a second Ctrl-C stops at once.

    Python allows signal handlers in the main thread only; elsewhere the flag is never set.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        flag.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)

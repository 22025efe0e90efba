"""The meta-training loop of ``maml-cuda train``, of any algorithm, resumable to the bit.

A run is one folder: ``metrics.csv``, the checkpoints ``last/`` and ``best/`` (and ``best-1/`` to ``best-N/``,
the N best ones in any order, where a setting asks for several), and what ``report.py`` adds at the end. Times
stand in the checkpoint and in summary.json, never in metrics.csv, so that an interrupted and resumed run leaves
the very file of one that was not. While a command trains it, ``lock`` is there too (``run_lock.py``).
"""

import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maml_cuda.data import ImageTasks, MetaBatch
from maml_cuda.train.algorithms import make_algorithm, meta_lr
from maml_cuda.train.checkpoint import (
    UnusableCheckpoint,
    load_checkpoint,
    load_info,
    load_model,
    load_optimizer,
    load_parameters,
    not_finite,
    optimizer_tensors,
    save_checkpoint,
)
from maml_cuda.train.evaluate import evaluate
from maml_cuda.train.interrupts import interrupt_flag
from maml_cuda.train.jobs import format_score, make_generator, make_tasks, score
from maml_cuda.train.metrics import Metrics
from maml_cuda.train.run_info import MAY_CHANGE, restore_settings, with_checksum
from maml_cuda.train.run_lock import LOCK
from maml_cuda.train.settings import Settings, is_classification, metric_name

COLUMNS = ("iteration", "loss", "before", "after", "validation")


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
        self.classes: list[str] = []  # of images, that are trained on
        self.metrics = Metrics(run / "metrics.csv", self.columns)
        self.running = torch.zeros(2)  # sums of loss and score since the last row of metrics.csv
        self._build()

    def _build(self) -> None:
        """Everything that is learned (``module``), optimizer, tasks and generator of the settings."""
        settings = self.settings
        self.algorithm = make_algorithm(settings)
        self.module = self.algorithm.module
        self.optimizer: Any = self.algorithm.optimizer  # None where nothing is learned
        tasks = make_tasks(settings, "train")
        if isinstance(tasks, ImageTasks):
            self.classes = list(tasks.names)
        self.tasks = self.algorithm.sampler(tasks)
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
        if run.exists() and (not run.is_dir() or any(path.name != LOCK for path in run.iterdir())):
            raise FileExistsError(
                f"{run} exists already: choose another --out, or continue that run with --resume {run}"
            )
        training = cls(run, settings)
        run.mkdir(parents=True, exist_ok=True)
        training.metrics.start()
        training.save("last")
        return training

    @classmethod
    def resume(cls, run: Path, settings: Settings, checkpoint: str = "last") -> "Training":
        """The run as this checkpoint left it, which is its last from now on; rows of metrics.csv and checkpoints that
        were written after it are taken back. Errors are those of ``checkpoint.load_checkpoint``."""
        model, tensors, info = load_checkpoint(run / checkpoint)
        if settings.iterations < info["iteration"]:
            raise ValueError(
                f"iterations must be at least {info['iteration']}, which are done, got {settings.iterations}"
            )
        training = cls(run, settings)
        load_parameters(training.module, model, run / checkpoint)
        load_optimizer(training.optimizer, tensors)
        training.generator.set_state(tensors["generator"])
        training.running = tensors["running"]
        training._restore(info)
        training.metrics.remove_after(training.iteration)
        if checkpoint != "last":
            training._remove_later_bests()
            training.save("last")
        return training

    def _restore(self, info: dict[str, Any]) -> None:
        """What ``_info`` says of a checkpoint."""
        self.iteration, self.bests = info["iteration"], info["bests"]
        self.seconds, self.cpu_seconds = info["seconds"], info["cpu_seconds"]

    def _remove_later_bests(self) -> None:
        """Of the best checkpoints leaves those that this iteration knows, as far as they still stand."""
        self._save_bests()  # a crash may have come between ``best`` and ``best-<n>``
        self.bests = [best for best in self.bests if "checkpoint" not in best or self._is_intact(best)]
        for path in self.run.glob("best-*"):
            if path.name not in {best["checkpoint"] for best in self.bests}:
                shutil.rmtree(path)

    def _is_intact(self, best: dict[str, Any]) -> bool:
        """Whether its checkpoint is whole, and not that of a later iteration."""
        try:
            return load_model(self.run / best["checkpoint"])[1]["iteration"] == best["iteration"]
        except UnusableCheckpoint:
            return False

    def save(self, name: str) -> None:
        """Writes the checkpoint ``last``, ``best`` or ``best-<n>``."""
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {"generator": self.generator.get_state(), "running": self.running}
        save_checkpoint(self.run / name, self.module.state_dict(), tensors, with_checksum(self._info()))

    def _info(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "bests": self.bests,
            "classes": self.classes,
            "settings": asdict(self.settings),
        }

    def loop(self) -> None:
        """Trains up to ``settings.iterations``. All is saved before an interruption is raised: KeyboardInterrupt after
        Ctrl-C, ``interrupts.Terminated`` after SIGTERM, OSError where the output cannot be written to any more."""
        settings = self.settings
        with (
            self.metrics as metrics,
            interrupt_flag() as flag,
            tqdm(total=settings.iterations, initial=self.iteration, unit="it", dynamic_ncols=True) as bar,
        ):
            started, cpu_started = time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds

            def save() -> None:
                metrics.sync()  # before the checkpoint that says these rows exist
                self.seconds = time.perf_counter() - started
                self.cpu_seconds = time.process_time() - cpu_started
                self._save_bests()
                self.save("last")

            while self.iteration < settings.iterations:
                self.iteration += 1
                log = self.iteration % settings.log_interval == 0
                validate = self.iteration % settings.validation_interval == 0
                before = self._step(log)
                due = validate or self.iteration == settings.iterations or flag.signum is not None
                if log or due:
                    self._refuse_divergence(due)
                row, words = self._log(before, bar) if log else {}, ""
                if validate:
                    row["validation"], words = self._validate()
                if row:
                    metrics.add(self.iteration, row)
                if due:
                    save()
                try:  # last of all: nothing is lost where nobody reads it
                    if log:
                        bar.update(self.iteration - bar.n)
                    if words:
                        bar.write(words)
                except OSError:
                    save()
                    raise
                if due:
                    flag.interrupt()
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

    def _refuse_divergence(self, to_be_saved: bool) -> None:
        """ValueError where the loss, or anything of what ``to_be_saved``, is not finite."""
        loss, found = self.running[0].item(), ""
        if not math.isfinite(loss):
            found = f"the loss must be finite, got {loss}"
        elif to_be_saved and (name := not_finite(self.module.state_dict() | optimizer_tensors(self.optimizer))):
            found = f"{name} must be finite, got NaN or infinity"
        if found:
            raise ValueError(
                f"{found} before iteration {self.iteration}: "
                "lower --meta-lr or --inner-lr; the last checkpoint is from before that"
            )

    def _log(self, before: Any, bar: tqdm) -> dict[str, float]:
        """The row of metrics.csv, with what ``_step`` returned: loss and score are means since the last row, the score
        before adaptation is one meta-batch's. Puts it behind the bar, which is not drawn here."""
        job = self.settings.job
        loss, after = (self.running / self.settings.log_interval).tolist()
        self.running.zero_()
        row = {"loss": loss, "after": after}
        scores = format_score(job, after)
        if before is not None:
            row["before"] = before.item()
            scores = f"{format_score(job, row['before'])} -> {scores}"
        bar.set_postfix_str(
            f"loss {loss:.3g}, {metric_name(job)} {scores}, {self._tasks_per_second(bar):.3g} tasks/s", refresh=False
        )
        return row

    def _tasks_per_second(self, bar: tqdm) -> float:
        elapsed = bar.format_dict["elapsed"]
        return (self.iteration - bar.initial) * self.settings.meta_batch / elapsed if elapsed else 0.0

    def _validate(self) -> tuple[float, str]:
        """The mean score over 1..test_steps adaptation steps (without any, where none are taken), and a line that says
        it; notes the best.

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
        self._record_validation(mean, rising=is_classification(settings.job), kept=settings.best_checkpoints)
        over = f" over {steps[0]} to {steps[-1]} steps" if steps[-1] else ""
        found = f"{metric_name(settings.job)} {format_score(settings.job, mean)}{over}"
        return mean, f"iteration {self.iteration}: validation {found}"

    def _record_validation(self, score: float, *, rising: bool, kept: int = 1) -> None:
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


def resumed_settings(run: Path, given: dict[str, Any], kind: type = Settings, checkpoint: str = "last") -> Any:
    """The settings (a ``kind``) of a checkpoint of ``run`` with those of ``given`` that a resumed run may change.

    FileNotFoundError where no run is, ValueError where ``given`` would make it another run.
    """
    folder = run / checkpoint
    stored: Any = restore_settings(kind, load_info(folder), folder)
    may_change = MAY_CHANGE if getattr(stored, "meta_schedule", "constant") == "constant" else MAY_CHANGE[1:]
    for name, value in given.items():
        if name not in may_change and (old := getattr(stored, name)) != value:
            raise ValueError(f"{name} must stay {old} in the resumed run {run}, got {value}")
    return replace(stored, **given)

"""The meta-training loop of ``maml-cuda train``. A resumed run gives the same bits as one that was not interrupted.

A run is one folder. It holds ``metrics.csv``, the checkpoints ``last/`` and ``best/``, ``best-1/`` to ``best-N/`` if a
setting asks for the N best ones (in any order), and the files that ``report.py`` writes at the end. Times are in the
checkpoint and in summary.json, not in metrics.csv, so that this file is the same for a resumed run. While a process
trains the run, the folder also holds ``lock`` (``run_lock.py``).
"""

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maml_cuda.data import ImageTasks, MetaBatch
from maml_cuda.train.algorithms import make_algorithm, meta_lr
from maml_cuda.train.bests import checkpoints_at, remove_others, with_validation
from maml_cuda.train.checkpoint import (
    load_checkpoint,
    load_optimizer,
    load_parameters,
    not_finite,
    optimizer_tensors,
    save_checkpoint,
)
from maml_cuda.train.devices import CPU
from maml_cuda.train.evaluate import evaluate
from maml_cuda.train.interrupts import interrupt_flag
from maml_cuda.train.jobs import format_score, make_generator, make_tasks, score
from maml_cuda.train.metrics import Metrics
from maml_cuda.train.progress import Progress
from maml_cuda.train.ranks import ALONE, Ranks
from maml_cuda.train.run_info import with_checksum
from maml_cuda.train.run_lock import LOCK
from maml_cuda.train.settings import Settings, is_classification, metric_name
from maml_cuda.train.tensorboard import TensorBoard

# What a checkpoint holds: the tensors of the module, those of the optimizer and of the training, and the rest.
State = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
COLUMNS = ("iteration", "loss", "before", "after", "validation")


class Training:
    """The state of a run between two meta-iterations: everything that a checkpoint holds.

    Attributes:
        run: the run's folder.
        settings: the run's settings.
        device: the device of the module and of the data.
        ranks: the processes that train the run; the first one alone writes to the folder.
        tensorboard: whether the rows of metrics.csv are also written for TensorBoard; False at first.
        iteration: the number of iterations done.
        seconds: wall time of the training.
        cpu_seconds: CPU time of all threads.
        bests: the best validations, the best first: iteration, score and, if several are kept, the checkpoint's name.
        classes: the names of the classes that are trained on, for images.
        module: everything that is learned.
        optimizer: the optimizer of the meta-parameters; None if nothing is learned.
        generator: the source of random numbers for the training tasks.
        running: sums of loss and score since the last row of metrics.csv, ``[2]``.
    """

    columns: tuple[str, ...] = COLUMNS  # columns of metrics.csv

    def __init__(self, run: Path, settings: Settings, device: torch.device = CPU, ranks: Ranks = ALONE) -> None:
        self.run = run
        self.settings = settings
        self.device = device
        self.ranks = ranks
        self.tensorboard = False
        self.iteration = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.bests: list[dict[str, Any]] = []
        self.classes: list[str] = []
        self.metrics = Metrics(run / "metrics.csv", self.columns)
        self.running = torch.zeros(2, device=device)
        self._build()

    def _build(self) -> None:
        """Creates the module, the optimizer, the tasks and the generator."""
        settings, device = self.settings, self.device
        self._check_processes()
        self.algorithm = make_algorithm(settings, device)
        self.algorithm.ranks = self.ranks
        self.module = self.algorithm.module
        self.optimizer: Any = self.algorithm.optimizer  # None where nothing is learned
        tasks = make_tasks(settings, "train", device=device)
        if isinstance(tasks, ImageTasks):
            self.classes = list(tasks.names)
        self.tasks = self.algorithm.sampler(tasks)
        self.validation_tasks = make_tasks(settings, "validation", device=device)
        make_tasks(settings, "test")  # raises now if the settings could not be tested at the end
        self.generator = make_generator(settings, "train")

    def _check_processes(self) -> None:
        """Raises ValueError if the run cannot be divided among its processes."""
        settings, count = self.settings, self.ranks.count
        if count > 1 and settings.algorithm == "pretrained":
            raise ValueError(f"processes must be 1 for pretrained, which has no tasks to divide, got {count}")
        if count > 1 and count > settings.meta_batch:
            raise ValueError(f"processes must be at most {settings.meta_batch}, the tasks of a meta-batch, got {count}")

    @property
    def backend(self) -> str:
        """The backend that runs."""
        return self.algorithm.backend

    @classmethod
    def start(cls, run: Path, settings: Settings, device: torch.device = CPU, ranks: Ranks = ALONE) -> "Training":
        """A new run in a new folder.

        Raises:
            FileExistsError: ``run`` exists, and holds more than what a start that was killed leaves.
        """
        if run.exists() and not (run.is_dir() and all(map(_is_left_by_a_start, run.iterdir()))):
            raise FileExistsError(
                f"{run} exists already: choose another --out, or continue that run with --resume {run}"
            )
        training = cls(run, settings, device, ranks)
        run.mkdir(parents=True, exist_ok=True)
        training.metrics.start()
        training.save("last")
        return training

    @classmethod
    def resume(
        cls,
        run: Path,
        settings: Settings,
        checkpoint: str = "last",
        device: torch.device = CPU,
        ranks: Ranks = ALONE,
    ) -> "Training":
        """The run in the state of a checkpoint, which becomes its last one.

        Later rows of metrics.csv and later checkpoints are removed.

        Raises:
            ValueError: ``settings`` has fewer iterations than the checkpoint.
            MissingCheckpoint: see ``checkpoint.load_checkpoint``.
            DamagedCheckpoint: see ``checkpoint.load_checkpoint``.
        """
        model, tensors, info = load_checkpoint(run / checkpoint)
        if settings.iterations < info["iteration"]:
            raise ValueError(
                f"iterations must be at least {info['iteration']}, which the run has done, got {settings.iterations}"
            )
        training = cls(run, settings, device, ranks)
        training._load((model, tensors, info), run / checkpoint)
        training.metrics.remove_after(training.iteration)
        if checkpoint != "last":
            training._remove_later_bests()
            training.save("last")
        return training

    @classmethod
    def follow(cls, run: Path, settings: Settings, state: State, device: torch.device, ranks: Ranks) -> "Training":
        """The training of the first process as another one takes part in it, from its ``state()``."""
        training = cls(run, settings, device, ranks)
        training._load(state, run)
        return training

    def state(self) -> State:
        """What a checkpoint holds, with its tensors on the CPU."""
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {"generator": self.generator.get_state(), "running": self.running}
        model = self.module.state_dict()
        info = with_checksum(self._info())
        return {name: t.cpu() for name, t in model.items()}, {name: t.cpu() for name, t in tensors.items()}, info

    def _load(self, state: State, folder: Path) -> None:
        model, tensors, info = state
        load_parameters(self.module, model, folder)
        load_optimizer(self.optimizer, tensors)
        self.generator.set_state(tensors["generator"])
        self.running = tensors["running"].to(self.device)
        self._restore(info)

    def _restore(self, info: dict[str, Any]) -> None:
        """Restores the values that ``_info`` put into a checkpoint."""
        self.iteration, self.bests = info["iteration"], info["bests"]
        self.seconds, self.cpu_seconds = info["seconds"], info["cpu_seconds"]

    def _remove_later_bests(self) -> None:
        """Keeps the best checkpoints that are intact and not later than this iteration; removes the others."""
        self._save_bests()  # a crash may have happened between writing ``best`` and ``best-<n>``
        self.bests = remove_others(self.run, self.bests)

    def save(self, name: str) -> None:
        """Writes the checkpoint ``last``, ``best`` or ``best-<n>``."""
        save_checkpoint(self.run / name, *self.state())

    def _info(self) -> dict[str, Any]:
        """The entries of a checkpoint that are not tensors."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "bests": self.bests,
            "classes": self.classes,
            "settings": asdict(self.settings),
        }

    def loop(self) -> None:
        """Trains up to ``settings.iterations``. The run is saved before an interruption is raised. Several processes
        stop after the same iteration.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM, here or in another process.
            OSError: a file or standard output cannot be written, or another process has ended.
            ValueError: the loss or a parameter is not finite.
        """
        settings, first = self.settings, self.ranks.first
        with (
            self.metrics if first else nullcontext() as metrics,
            interrupt_flag() as flag,
            TensorBoard(self.run, self.iteration) if first and self.tensorboard else nullcontext() as curves,
            Progress(settings.iterations, self.iteration, shown=first) as progress,
        ):
            started, cpu_started = time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds

            def save() -> None:
                self.seconds = time.perf_counter() - started
                self.cpu_seconds = time.process_time() - cpu_started
                if metrics is None:
                    return
                metrics.sync()  # before the checkpoint, which requires that these rows exist
                if curves is not None:
                    curves.sync()
                self._save_bests()
                self.save("last")

            while self.iteration < settings.iterations:
                self.iteration += 1
                log = self.iteration % settings.log_interval == 0
                validate = self.iteration % settings.validation_interval == 0
                before = self._step(log)
                if self.ranks.any(flag.signum is not None):
                    flag.signum = flag.signum or signal.SIGTERM
                due = validate or self.iteration == settings.iterations or flag.signum is not None
                if log or due:
                    self._refuse_divergence(due)
                row, words = self._log(before, progress) if log else {}, ""
                if validate:
                    row["validation"], words = self._validate()
                if row and metrics is not None:
                    metrics.add(self.iteration, row)
                if row and curves is not None:
                    curves.add(self.iteration, row)
                if due:
                    save()
                try:  # after the row and the checkpoint, which are kept if standard output is closed
                    if log:
                        progress.update(self.iteration)
                    if words:
                        progress.print(words)
                except OSError:
                    save()
                    raise
                if due:
                    flag.interrupt()
            progress.update(self.iteration)
        if first and not self.bests:  # fewer iterations than one validation interval
            self.save("best")

    def _save_bests(self) -> None:
        """Writes ``best`` and ``best-<n>`` if the validation of this iteration is among the best."""
        for name in checkpoints_at(self.bests, self.iteration):
            self.save(name)

    def _step(self, log: bool) -> Any:
        """One meta-iteration.

        Returns:
            If ``log``, the mean score of its tasks before adaptation, for algorithms that adapt; otherwise None.
        """
        settings = self.settings
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = meta_lr(settings, self.iteration)
        batch = self._sample()
        before = None
        if log and isinstance(batch, MetaBatch) and len(self.algorithm.steps) > 1:
            before = score(settings.job, self.algorithm.predict(batch, 0), batch.y_qry).mean()
            self.ranks.average([before], settings.meta_batch)
        # Summed as tensors: converting them to numbers at every iteration would cost time.
        self.running += self.algorithm.step(batch, self.iteration)
        return before

    def _sample(self) -> Any:
        """This process's part of the next meta-batch."""
        tasks, generator, number = self.tasks, self.generator, self.settings.meta_batch
        if self.ranks.count == 1:
            return tasks.sample(number, generator)
        return tasks.sample(number, generator, self.ranks.part(number))

    def _refuse_divergence(self, to_be_saved: bool) -> None:
        """Raises ValueError if the loss is not finite or, if ``to_be_saved``, a tensor of the checkpoint is not."""
        loss, found = self.running[0].item(), ""
        if not math.isfinite(loss):
            found = f"the loss must be finite, got {loss}"
        elif to_be_saved and (name := not_finite(self.module.state_dict() | optimizer_tensors(self.optimizer))):
            found = f"{name} must be finite, got NaN or infinity"
        if found:
            raise ValueError(
                f"{found} before iteration {self.iteration}: "
                "lower --meta-lr or --inner-lr; the last checkpoint was saved before that"
            )

    def _log(self, before: Any, progress: Progress) -> dict[str, float]:
        """The row of metrics.csv, from what ``_step`` returned. Also sets the words of ``progress``.

        Loss and score are means since the last row; the score before adaptation is that of one meta-batch.
        """
        job = self.settings.job
        loss, after = (self.running / self.settings.log_interval).tolist()
        self.running.zero_()
        row = {"loss": loss, "after": after}
        scores = format_score(job, after)
        if before is not None:
            row["before"] = before.item()
            scores = f"{format_score(job, row['before'])} -> {scores}"
        speed = progress.rate(self.iteration) * self.settings.meta_batch
        progress.words = f"loss {loss:.3g}, {metric_name(job)} {scores}, {speed:.3g} tasks/s"
        return row

    def _validate(self) -> tuple[float, str]:
        """The validation score and a line of text that reports it. Records the score if it is among the best.

        The score is the mean over 1 to ``test_steps`` adaptation steps, or the score without adaptation for algorithms
        that do not adapt. The tasks are the same each time, so that validations differ by the model only. The mean over
        all steps matters for the sinusoid: late in training, one step still improves while ten steps begin to diverge
        on rare tasks.
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
            self.ranks,
        )
        mean = scores.double().mean().item()
        rising = is_classification(settings.job)
        self.bests = with_validation(self.bests, self.iteration, mean, rising=rising, kept=settings.best_checkpoints)
        over = f" over {steps[0]} to {steps[-1]} steps" if steps[-1] else ""
        found = f"{metric_name(settings.job)} {format_score(settings.job, mean)}{over}"
        return mean, f"iteration {self.iteration}: validation {found}"


def _is_left_by_a_start(path: Path) -> bool:
    """Whether a start that was killed before its first checkpoint leaves this file."""
    if path.name == "metrics.csv":
        return path.read_bytes().count(b"\n") <= 1
    return path.name in (LOCK, "metrics.csv.new", "last.new")

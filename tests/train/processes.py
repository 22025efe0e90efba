"""Training runs of several processes: what starts them, and what they run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from maml_cuda.data import MetaBatch
from maml_cuda.train import checkpoint, loop
from maml_cuda.train.algorithms import make_algorithm
from maml_cuda.train.devices import CPU
from maml_cuda.train.jobs import make_tasks
from maml_cuda.train.ranks import Ranks, join

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(count: int, script: Path, *arguments: str, log: Path) -> list[subprocess.Popen]:
    """Starts `count` processes as torchrun would. Rank r prints to `log` with the suffix r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-W", "error", str(script), *arguments]
        with log.with_suffix(f".{rank}").open("w") as out:
            environment = os.environ | ENVIRONMENT | place
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    return started


def end(started: Sequence[subprocess.Popen], seconds: float = 300) -> list[int]:
    """Waits for processes, kills those that take longer, and returns their statuses."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def in_float64(replace: Callable[[Any, str, Any], None]) -> None:
    """Makes training loops compute in float64. `replace` is setattr, or a fixture's that undoes it."""

    def algorithm(*arguments: Any) -> Any:
        made = make_algorithm(*arguments)
        made.module.double()
        return made

    def tasks(*arguments: Any, **more: Any) -> Any:
        made = make_tasks(*arguments, **more)
        sample = made.sample
        made.sample = lambda *of: MetaBatch(*(t.double() if t.is_floating_point() else t for t in sample(*of)))
        return made

    replace(loop, "make_algorithm", algorithm)
    replace(loop, "make_tasks", tasks)


def kill_at(moment: str) -> None:
    """Sends this process a signal at a moment, such as "KILL step 13": SIGKILL during iteration 13.

    step: after the gradient, before the sum over processes. replace: between the two renames of a checkpoint of that
    iteration. validate: during a validation.
    """
    name, at, iteration = moment.split()
    number = signal.Signals[f"SIG{name}"]

    def before(owner: Any, method: str, at_iteration: Callable[..., int]) -> None:
        original = getattr(owner, method)

        def replaced(*arguments: Any, **more: Any) -> Any:
            if at_iteration(*arguments, **more) == int(iteration):
                os.kill(os.getpid(), number)
            return original(*arguments, **more)

        setattr(owner, method, replaced)

    if at == "validate":
        before(loop.Training, "_validate", lambda training: training.iteration)
    elif at == "step":
        calls = iter(range(1, 1000))
        before(Ranks, "average", lambda ranks, tensors, tasks: next(calls) if len(tensors) > 1 else 0)
    else:
        now = []
        save, rename = loop.Training.save, os.replace
        loop.Training.save = lambda self, name: now.append(self.iteration) or save(self, name)  # type: ignore[method-assign]

        def replaced(old: Any, new: Any) -> None:
            rename(old, new)
            if str(new).endswith(".old") and now[-1] == int(iteration):
                os.kill(os.getpid(), number)

        checkpoint.os.replace = replaced  # type: ignore[attr-defined]


def say_which_threads_are_left() -> None:
    """Prints which threads of gloo are left: at the end of a process they could abort it. Nothing if there are none."""
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    if left := sorted(name for name in names if "gloo" in name):
        print("threads are left:", *left, flush=True)


def trained_together(runs: dict[Path, Any]) -> None:
    """Trains runs, one after the other, with the other processes: new ones, or those whose folder exists."""
    ranks = join(CPU)
    for run, settings in runs.items():
        if ranks.first:
            begin = loop.Training.resume if run.exists() else loop.Training.start
            training = begin(run, settings, ranks=ranks)
            ranks.from_first(training.state())
        else:
            training = loop.Training.follow(run, settings, ranks.from_first(), CPU, ranks)
        training.loop()
        same_everywhere(training)
    ranks.leave()


def same_everywhere(training: loop.Training) -> None:
    """Asserts that all processes hold the same bits."""
    mine, _, info = training.state()
    theirs, _, info_of_first = training.ranks.from_first(training.state())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert info["bests"] == info_of_first["bests"]

"""Runs jobs in a separate process, so that a crash, a hang or an endless compilation ends only that job.

A job is a generator function, named ".module:function" relative to this package. It yields pieces of the record
(dictionaries); those yielded before a failure are kept.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

Piece = dict[str, Any]


class Failed(Exception):
    """A job did not finish; the message says why."""


class TimedOut(Failed):
    """A job exceeded its time limit."""


class DeviceLost(Exception):
    """A kernel has faulted and the device no longer responds. Only a new process can use it."""


class TimeLimitExceeded(BaseException):
    """Raised by `time_limit`. A BaseException, so that no `except Exception` in the body catches it."""


def describe_error(error: BaseException) -> str:
    """The type and the first lines of an error message."""
    if isinstance(error, Failed):
        return str(error)
    lines = str(error).strip().splitlines()
    text = "\n".join(lines[:4]) + ("\n..." if len(lines) > 4 else "")
    return f"{type(error).__name__}: {text}"[:1000]


def start(target: str, arguments: tuple[Any, ...]) -> Iterator[Piece]:
    """Calls the job named `target`."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module, __package__), function)(*arguments)


class CurrentProcess:
    """Runs jobs in this process, for the emulation. The time limit is checked between two pieces."""

    def run(self, target: str, *arguments: Any, seconds: float) -> Iterator[Piece]:
        end = time.monotonic() + seconds
        try:
            for piece in start(target, arguments):
                yield piece
                if time.monotonic() > end:
                    raise TimedOut(f"stopped at its time limit of {seconds:.3g} s")
        except Failed:
            raise
        except Exception as error:
            raise Failed(describe_error(error)) from error

    def stop(self) -> None:
        pass


class SeparateProcess:
    """Runs jobs one after the other in one process. After a failure the next job starts a new process.

    method: "spawn" for a new interpreter, or "forkserver" to fork a server that has imported torch and this package,
        which starts faster.
    """

    def __init__(self, method: str = "spawn") -> None:
        self._method = method
        self._process: Any = None
        self._pipe: Any = None

    def run(self, target: str, *arguments: Any, seconds: float) -> Iterator[Piece]:
        end = time.monotonic() + seconds
        if self._process is None:
            self._start()
        finished = False
        try:
            self._pipe.send((target, arguments))
            while True:
                if not self._pipe.poll(max(0.0, end - time.monotonic())):
                    raise TimedOut(f"stopped at its time limit of {seconds:.3g} s")
                kind, piece = self._pipe.recv()
                if kind == "failed":
                    raise Failed(piece)
                if kind == "end":
                    finished = True
                    return
                yield piece
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise Failed(f"the process ended with exit code {self._process.exitcode}") from error
        finally:
            if not finished:
                self.stop()

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(self._method)
        if self._method == "forkserver":
            context.set_forkserver_preload(["torch", "benchmarks.jobs"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and the compilers that it has started
            self._process.kill()
            self._process.join(10)
            self._pipe.close()
            self._process = None


def serve(pipe: Any) -> None:
    """The main function of the process of a SeparateProcess."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    os.setpgrp()
    while True:
        try:
            target, arguments = pipe.recv()
        except EOFError:
            return
        try:
            for piece in start(target, arguments):
                pipe.send(("piece", piece))
        except Exception as error:
            pipe.send(("failed", describe_error(error)))
        else:
            pipe.send(("end", None))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitExceeded in the body after the given seconds, as soon as Python code runs (main thread only).

    It is raised again every half second, because an exception inside a finalizer or a callback of the garbage
    collector is lost.
    """

    def ring(*_: object) -> None:
        raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

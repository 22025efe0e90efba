"""Where a job runs: in a process of its own, so that a crash, a hang or an endless compilation costs that job only.

A job is a generator of pieces of the record, named ".module:function" in this package. The pieces that came before a
failure are kept.
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
    """A job or a part did not come to its end; the words say why."""


class Stopped(Failed):
    """A job took longer than it was given."""


class Lost(Exception):
    """The device no longer answers: a kernel faulted. Only a new process can use it again."""


class OutOfTime(BaseException):
    """Raised by `limit`; no `except Exception` on the way stops it."""


def words(error: BaseException) -> str:
    """An error in at most a few lines."""
    if isinstance(error, Failed):
        return str(error)
    lines = str(error).strip().splitlines()
    text = "\n".join(lines[:4]) + ("\n..." if len(lines) > 4 else "")
    return f"{type(error).__name__}: {text}"[:1000]


def start(target: str, arguments: tuple[Any, ...]) -> Iterator[Piece]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module, __package__), function)(*arguments)


class Here:
    """In this process, stopped only between two pieces: for the emulation."""

    def run(self, target: str, *arguments: Any, seconds: float) -> Iterator[Piece]:
        end = time.monotonic() + seconds
        try:
            for piece in start(target, arguments):
                yield piece
                if time.monotonic() > end:
                    raise Stopped(f"stopped after its {seconds:.3g} seconds")
        except Failed:
            raise
        except Exception as error:
            raise Failed(words(error)) from error

    def stop(self) -> None:
        pass


class Apart:
    """In a process that serves one job after the other until one fails; then the next job starts a new one.

    It is a fresh one ("spawn"), or where many are needed the fork of a server that has only imported torch and this
    package ("forkserver").
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
                    raise Stopped(f"stopped after its {seconds:.3g} seconds")
                kind, piece = self._pipe.recv()
                if kind == "failed":
                    raise Failed(piece)
                if kind == "end":
                    finished = True
                    return
                yield piece
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise Failed(f"its process died (exit code {self._process.exitcode})") from error
        finally:
            if not finished:
                self.stop()

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(self._method)
        if self._method == "forkserver":
            context.set_forkserver_preload(["torch", "benchmarks.side"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # compilers that it started, too
            self._process.kill()
            self._process.join(10)
            self._pipe.close()
            self._process = None


def serve(pipe: Any) -> None:
    """The process of Apart."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
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
            pipe.send(("failed", words(error)))
        else:
            pipe.send(("end", None))


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the body once the seconds are over and Python has the word again (main thread only).

    And again every half second: raised inside a finalizer or a callback of the garbage collector, it is lost.
    """

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

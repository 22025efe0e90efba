"""Saves a run at Ctrl-C and at SIGTERM, which Slurm and Docker send before they kill a process."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, as KeyboardInterrupt is by Ctrl-C."""


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """The exit status in a shell's convention: 128 plus the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def raise_interrupt(signum: int, frame: FrameType | None = None) -> None:
    """A signal handler that raises Terminated for SIGTERM, otherwise KeyboardInterrupt."""
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


class InterruptFlag:
    """A signal handler that stores the first signal. A second signal of the same kind raises at once."""

    signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        signal.signal(signum, raise_interrupt)

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt or Terminated if a signal has arrived."""
        if self.signum is not None:
            raise_interrupt(self.signum)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """A context in which SIGTERM raises Terminated."""
    with handled({signal.SIGTERM: raise_interrupt}):
        yield


@contextmanager
def interrupt_flag() -> Iterator[InterruptFlag]:
    """A context in which signals set the flag that it yields, so that the caller chooses when to raise."""
    flag = InterruptFlag()
    with handled(dict.fromkeys(SIGNALS, flag)):
        yield flag


@contextmanager
def handled(
    handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None] | signal.Handlers],
) -> Iterator[None]:
    """Sets signal handlers and restores the previous ones. Does nothing outside the main thread, where Python forbids
    handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)  # None: not set by Python

"""Ctrl-C and SIGTERM, which Slurm and Docker send some seconds before they kill: a run saves at both."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises, as Ctrl-C raises KeyboardInterrupt."""


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """As a shell counts it: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def raise_interrupt(signum: int, frame: FrameType | None = None) -> None:
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


class InterruptFlag:
    """Set to the first signal that arrives; the second one of its kind interrupts at once."""

    signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        signal.signal(signum, raise_interrupt)

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt or Terminated, if a signal has arrived."""
        if self.signum is not None:
            raise_interrupt(self.signum)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated."""
    with _handled({signal.SIGTERM: raise_interrupt}):
        yield


@contextmanager
def interrupt_flag() -> Iterator[InterruptFlag]:
    """Signals set the flag that is yielded, for the moment when all is whole."""
    flag = InterruptFlag()
    with _handled(dict.fromkeys(SIGNALS, flag)):
        yield flag


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Python allows signal handlers in the main thread only; elsewhere these are not set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)  # None: not set by Python

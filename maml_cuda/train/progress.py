"""How far a run is, on standard error: a bar on a terminal; elsewhere, as in a log file, a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

INTERVAL = 30.0  # least number of seconds between two lines


class Progress:
    """The progress of a run. What it prints ends with its context.

    Args:
        total: the iterations of the run.
        done: those done before.
        shown: whether anything is printed.

    Attributes:
        words: what is printed behind the count, such as the loss.
    """

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        self.words = ""
        self._total, self._first, self._done, self._shown = total, done, done, shown
        self._started = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="it", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def rate(self, done: int) -> float:
        """Iterations per second in this process, if so many are done."""
        seconds = time.monotonic() - self._started
        return (done - self._first) / seconds if seconds else 0.0

    def update(self, done: int) -> None:
        """Prints that so many iterations are done: in a line if the last one is ``INTERVAL`` ago, or if they are all.

        Raises:
            OSError: standard error is closed.
        """
        before, self._done = self._done, done
        if self._bar is not None:
            self._bar.set_postfix_str(self.words, refresh=False)
            self._bar.update(done - before)
        elif self._shown and sys.stderr is not None and before < done:
            now = time.monotonic()
            if done == self._total or now - self._printed >= INTERVAL:
                self._printed = now
                print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = self.rate(self._done)
        left = f", {tqdm.format_interval((self._total - self._done) / rate)} left" if rate else ""
        words = f": {self.words}" if self.words else ""
        return f"iteration {self._done} of {self._total}, {tqdm.format_interval(seconds)} passed{left}{words}"

    def print(self, words: str) -> None:
        """Prints a line on standard output, above the bar.

        Raises:
            OSError: standard output is closed.
        """
        if not self._shown:
            return
        if self._bar is None:
            print(words)
        else:
            self._bar.write(words)

"""Standard output and standard error of the commands: printed line by line, in any encoding, and no error if they are
closed.
"""

import codecs
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ASCII = {"±": "+/-"}


def _ascii_fallback(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that an encoding lacks: by ASCII from the table, otherwise by an escape sequence."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


codecs.register_error("maml_cuda.ascii", _ascii_fallback)


@contextmanager
def readable_output() -> Iterator[None]:
    """A context in which output is printed line by line, a warning is one line, and characters that the encoding lacks
    are replaced.

    Raises:
        OSError: at the end, if output could not be written.
    """
    streams: list[Any] = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [(stream.errors, stream.line_buffering) for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="maml_cuda.ascii", line_buffering=True)
    form, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"maml-cuda: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = form
        for stream, (errors, line_buffering) in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors, line_buffering=line_buffering)  # flushes


def discard_broken_streams() -> str:
    """Redirects streams that can no longer be written to the null device, because the interpreter flushes them once
    more at exit.

    Returns:
        The name of a lost stream, empty if there is none.
    """
    lost = ""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for name, stream in (("standard output", sys.stdout), ("standard error", sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
            lost = name
    os.close(nowhere)
    return lost


def print_error(words: str) -> None:
    """Prints to standard error; does nothing if that is closed."""
    try:
        print(words, file=sys.stderr, flush=True)
    except OSError:
        discard_broken_streams()

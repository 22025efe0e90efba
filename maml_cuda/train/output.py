"""Standard output and error of the commands: line by line, in any encoding, and silent once nobody can be reached."""

import codecs
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ASCII = {"±": "+/-"}


def _ascii_fallback(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks: in ASCII, where it has a spelling there, else escaped."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


codecs.register_error("maml_cuda.ascii", _ascii_fallback)


@contextmanager
def readable_output() -> Iterator[None]:
    """Lines come as they are printed, a warning is one, and none is lost to an encoding that lacks a character of it.
    OSError at the end where they could not be delivered."""
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
    """What can no longer be printed goes nowhere: the interpreter would try it once more at its end. Returns the name
    of the stream that is lost, or nothing."""
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
    """On standard error, if that can be reached."""
    try:
        print(words, file=sys.stderr, flush=True)
    except OSError:
        discard_broken_streams()

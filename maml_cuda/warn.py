"""Warnings at the user's line."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_USERS = ("maml_cuda", "torch")  # between the user and a `forward` of ours stands nn.Module.__call__


def warn(text: str) -> None:
    """A UserWarning at the innermost line outside of this package and of torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)

"""Warnings that point at the user's line of code."""

from __future__ import annotations

import sys
import warnings

# Packages whose frames are skipped. torch is one of them because nn.Module.__call__ calls FusedMAML.forward.
_SKIPPED = ("maml_cuda", "torch")


def warn(text: str) -> None:
    """Emits a UserWarning at the innermost frame that is outside of maml_cuda and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)

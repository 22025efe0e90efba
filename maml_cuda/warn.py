"""Warnings at the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# torch's frames, too: between the user and a `forward` of ours stands nn.Module.__call__.
_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def warn(text: str) -> None:
    """A UserWarning at the first line outside of this package and of torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)

"""The workspace of a call on the CPU, which is kept for the next one.

Fresh pages must be cleared by the system, which can take as long as a call. Between calls the core marks the pages as
free (MADV_FREE), so that the system may take them when it runs short of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

_kept: list[Tensor] = []  # at most one; while a call has it, another thread's call takes a new one


def take(size: int) -> Tensor:
    """A workspace of at least so many bytes."""
    try:
        workspace = _kept.pop()
    except IndexError:
        workspace = None
    if workspace is not None and workspace.numel() >= size:
        return workspace
    del workspace  # before the larger one is allocated
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def keep(workspace: Tensor) -> None:
    """Keeps a workspace for the next call."""
    _kept[:] = [workspace]


def drop() -> None:
    """Frees what is kept."""
    _kept.clear()

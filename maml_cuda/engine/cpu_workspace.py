"""The workspace of a call on the CPU, which stays for the next one.

Fresh pages have to be cleared, and to make huge ones of them the system moves others away: as long a work as a call.
Between calls the core lends the pages to the system, which may take them as soon as it runs short of memory.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

_kept: list[Tensor] = []  # at most one; while a call has it, another thread's call takes a new one


def take(size: int) -> Tensor:
    """At least so many bytes."""
    with suppress(IndexError):
        workspace = _kept.pop()
        if workspace.numel() >= size:
            return workspace
        del workspace  # before the larger one comes
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def keep(workspace: Tensor) -> None:
    """For the next call."""
    _kept[:] = [workspace]


def drop() -> None:
    """Frees what is kept."""
    _kept.clear()
